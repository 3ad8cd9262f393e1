"""Training batches of nano's language for its adapter, laid out in the way the engine runs turns.

Every user message and every reply is written, including the generation header and the end of the message; system
messages are shown and never written. Three quarters of the conversations are written turn by turn, each turn seeing
only itself, as with a short window; the others are written with all turns in view. A question's prompt shows no earlier
turn, or the last few, which are read again with writes off; the question and its reply are written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from transformers import PreTrainedTokenizerBase

from agentmem.nano.recipe.batches import EpisodeEncoder
from agentmem.nano.recipe.chatml import render
from agentmem.nano.recipe.episodes import MemoryEpisode, draw_memory_episode
from agentmem.training.examples import Example, Pass

ACKNOWLEDGE_WEIGHT = 0.2
WRITE_WEIGHT = 0.5
"""Weight of all replies in the written turns of a batch; that of all questions is 1."""
_SKILLS = ("tool", "fact", "filler", "chatter", "offer", "unoffered", "remembered", "ask")
_SKILL_WEIGHTS = (10, 12, 6, 4, 12, 4, 46, 6)


@dataclass(frozen=True)
class Mix:
    """The kind of conversations in one batch.

    Attributes:
        bindings, fillers: inclusive ranges, drawn once per batch, so that rows are about equally long.
        episodes: conversations in the batch.
        unknown: one in this many conversations is asked something that was never stated; 0 = none.
        skills: whether the questions are tools, facts, small talk, and calls that need something stated earlier.
        calls: tool turns among the written turns, an inclusive range; a third of the questions then shows tools.
        plain: no changes, no questions among the written turns, no system message.
    """

    bindings: tuple[int, int]
    fillers: tuple[int, int]
    episodes: int
    unknown: int = 0
    skills: bool = False
    calls: tuple[int, int] = (0, 0)
    plain: bool = False


def stage_mix(step: int, steps: int) -> Mix:
    """The curriculum: one or two bindings until writing and reading are learned, then more, then long conversations.

    After the second stage four in ten steps have tools. Three of these ask for calls, facts and small talk, half of
    them for calls whose arguments are in memory, and one of the three comes after long conversations. The fourth has
    calls among the written turns, and tools in the prompts of some questions. The other six steps are pure recall, with
    up to twelve bindings and twenty turns of small talk. Towards the end fewer questions are about things never stated,
    since these teach doubt along with honesty.
    """
    if step < 0.2 * steps:
        return Mix((1, 2), (0, 1), 24, plain=True)
    kind = step % 10
    if kind in (5, 9):
        return Mix((1, 5), (0, 4), 11, skills=True)
    unknown = 2 if step < 0.8 * steps else 4
    if step < 0.35 * steps:
        return Mix((1, 6), (0, 2), 16, unknown)
    if kind == 2:
        return Mix((2, 6), (3, 9), 7, skills=True)
    if kind == 4:
        return Mix((1, 4), (0, 2), 7, unknown, calls=(1, 1))
    if kind == 1:
        return Mix((2, 9), (8, 20), 8, unknown)
    if kind == 6:
        return Mix((2, 9), (4, 12), 8, unknown)
    if kind == 8:
        return Mix((6, 12), (4, 16), 8, unknown)
    if kind == 3:
        return Mix((6, 12), (0, 4), 10, unknown)
    if kind == 0:
        return Mix((2, 8), (3, 8), 12, unknown)
    return Mix((1, 8), (0, 4), 16, unknown)


class MemoryBatches:
    """Conversations and questions for the adapter.

    Args:
        tokenizer: nano's tokenizer.
        seed: seed of all episodes.
        steps: steps of the whole training, for the curriculum.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, seed: int, steps: int) -> None:
        self._encoder = EpisodeEncoder(tokenizer)
        self._seed, self._steps = seed, steps

    def __call__(self, step: int) -> list[Example]:
        """The conversations of one step."""
        return self.draw(Random(f"memory-{self._seed}-{step}"), stage_mix(step, self._steps))

    def draw(self, rng: Random, mix: Mix) -> list[Example]:
        """Conversations of the given mix."""
        bindings, fillers = rng.randint(*mix.bindings), rng.randint(*mix.fillers)
        changes, asks = rng.choice((0, 0, 0, 1, 1, 2)), rng.choice((0, 0, 1, 2))
        shown = min(rng.choice((0, 0, 0, 0, 1, 2)), bindings + fillers)
        system, apart = rng.random() < 0.3, rng.random() < 0.75
        calls = rng.randint(*mix.calls)
        if mix.plain:
            changes, asks, shown, system = 0, 0, 0, False
        examples: list[Example] = []
        for i in range(mix.episodes):
            kinds = ["unknown" if mix.unknown and i % mix.unknown == 0 else "ask", *(["ask"] * (0 if shown else 2))]
            if mix.skills:
                kinds = rng.choices(_SKILLS, _SKILL_WEIGHTS)
            elif calls:
                kinds = [kinds[0], "remembered" if rng.random() < 0.4 else "ask"]
            episode = draw_memory_episode(
                rng,
                bindings=bindings,
                fillers=fillers,
                changes=changes,
                asks=asks,
                calls=calls,
                shown=shown,
                system=system,
                tooled=0.4 if mix.calls[1] else 0.25 if mix.skills else 0.0,
                questions=kinds,
            )
            examples.append(Example(self.written(episode, apart=apart), self.asked(episode)))
        return _weighted(examples)

    def written(self, episode: MemoryEpisode, *, apart: bool) -> tuple[Pass, ...]:
        """The write passes of an episode: one for each turn, or one for all of them."""
        passes: list[Pass] = []
        for i, turn in enumerate(episode.turns):
            if apart or i == 0:
                passes.append(Pass([], [], [], 0))
                opening = [episode.system] if episode.system else []
                tools = episode.tools if i in episode.equipped or not apart else ()
                for piece in render(opening, tools):
                    self._extend(passes[-1], piece.text, write=False, weight=0.0)
            # A reply that answers a question needs memory; the others repeat what is in view.
            counts = 1.0 if i in episode.recalls else ACKNOWLEDGE_WEIGHT
            for piece in render(turn):
                weight = counts if piece.reply else 0.0
                self._extend(passes[-1], piece.text, write=True, weight=weight)
        return tuple(map(_finished, passes))

    def asked(self, episode: MemoryEpisode) -> tuple[Pass, ...]:
        """The read passes of an episode: shown turns with writes off, then the question and its replies."""
        passes = []
        for question in episode.questions:
            asked = Pass([], [], [], 0)
            shown = episode.turns[len(episode.turns) - episode.shown :]
            tools = question.tools
            opening = [question.system] if question.system else []
            shown_count = sum(len(turn) for turn in shown)
            messages = [*opening, *(m for turn in [*shown, question.turn] for m in turn)]
            # The pieces of the shown turns and the head come first; an assistant message has three pieces.
            head = (
                (1 if opening or tools else 0)
                + shown_count
                + 2 * sum(m.role == "assistant" for turn in shown for m in turn)
            )
            for i, piece in enumerate(render(messages, tools)):
                reads = i >= head
                self._extend(asked, piece.text, write=reads, weight=1.0 if reads and piece.reply else 0.0)
            passes.append(_finished(asked))
        return tuple(passes)

    def _extend(self, each: Pass, text: str, *, write: bool, weight: float) -> None:
        ids = self._encoder.encode(text)
        each.ids.extend(ids)
        each.segments.extend([0 if write else -1] * len(ids))
        each.weights.extend([weight] * len(ids))


def _finished(each: Pass) -> Pass:
    return replace(each, split=len(each.ids))


def _weighted(examples: list[Example]) -> list[Example]:
    """The examples with weights that add up to 1 for all questions, and to `WRITE_WEIGHT` for all written turns."""
    written = sum(sum(each.weights) for example in examples for each in example.passes)
    asked = sum(sum(each.weights) for example in examples for each in example.asks)

    def scaled(passes: tuple[Pass, ...], factor: float) -> tuple[Pass, ...]:
        return tuple(replace(each, weights=[weight * factor for weight in each.weights]) for each in passes)

    return [
        Example(scaled(example.passes, WRITE_WEIGHT / (written or 1.0)), scaled(example.asks, 1.0 / (asked or 1.0)))
        for example in examples
    ]
