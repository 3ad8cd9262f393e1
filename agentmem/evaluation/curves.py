"""How a memory fades and fills: one fact asked for ever later, and ever more facts asked for at once, with controls.

    fading-N    one fact is told, and asked for when N messages have followed it (its own reply is the first)
    filling-N   N facts are told one after another, and some of them asked for at once

A model is asked in natural English (`agentmem.training.episodes`, values of all kinds known from training), nano in its
own language. Conversations are written as `agentmem.training.arms.measure` writes them; nothing of them is in a prompt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from agentmem.engine import Engine
from agentmem.errors import ConfigError
from agentmem.evaluation.facts import SEED
from agentmem.messages import Message
from agentmem.nano.recipe.language import Binding, answer, ask, draw_bindings, filler, is_correct, tell
from agentmem.training.arms import measure
from agentmem.training.contexts import ARMS, CONTROLLED, Arm
from agentmem.training.conversations import Ask
from agentmem.training.episodes import EpisodeConfig, FactEpisodes
from agentmem.training.facts.values import Vocabulary
from agentmem.training.predictions import Probe
from agentmem.training.sources import as_conversation

LIMIT = 100
"""Questions at a point where nothing else is asked for."""

_QUESTIONS = 4  # most questions about one conversation


@dataclass(frozen=True)
class CurvePoint:
    """A point of a curve: so many facts are told, and so many turns of other talk follow."""

    curve: str
    facts: int
    turns: int

    @property
    def place(self) -> int:
        """Where it is on its axis: messages since the fact, or facts."""
        return 1 + 2 * self.turns if self.curve == "fading" else self.facts

    @property
    def key(self) -> str:
        """Its name for files and for choosing points."""
        return f"{self.curve}-{self.place}"


_POINTS = [CurvePoint("fading", 1, turns) for turns in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)]
_POINTS += [CurvePoint("filling", facts, 0) for facts in (1, 2, 4, 8, 16, 32)]
POINTS = {point.key: point for point in _POINTS}
"""All points by key: 1 to 513 messages since a fact was told, 1 to 32 facts."""


def point_probes(point: CurvePoint, limit: int, seed: int, vocabulary: Vocabulary | None) -> tuple[Probe, ...]:
    """The first `limit` questions of a point.

    Args:
        point: what is told.
        limit: how many questions.
        seed: conversations are drawn from it, the point and their number.
        vocabulary: words for values; None: in nano's language.
    """
    draw = _nano(point, seed) if vocabulary is None else _english(point, seed, vocabulary)
    probes, number = list[Probe](), 0
    while len(probes) < limit or number < 2:  # two at least: a foreign memory is that of another conversation
        told, asks = draw(number)
        probes += [Probe(told, each, number) for each in asks]
        number += 1
    return tuple(probes if number == 2 else probes[:limit])


_Draw = Callable[[int], tuple[tuple[Message, ...], Sequence[Ask]]]


def _english(point: CurvePoint, seed: int, vocabulary: Vocabulary) -> _Draw:
    plain: dict[str, Any] = {"several": 0.0, "changes": 0.0, "rules": 0.0, "open_values": 0.0, "two_words": 0.0}
    plain |= {"acts": (("ask", 1.0),), "questions": _QUESTIONS}
    config = EpisodeConfig(facts=(point.facts, point.facts), fillers=(0, 0), **plain)
    talk = EpisodeConfig(facts=(0, 0), fillers=(point.turns, point.turns), **plain)
    facts = FactEpisodes(seed, config, vocabulary=vocabulary)
    after = FactEpisodes(seed + 1, talk, vocabulary=vocabulary)

    def draw(number: int) -> tuple[tuple[Message, ...], Sequence[Ask]]:
        told = as_conversation(facts.episode(number))
        return (*told.messages, *as_conversation(after.episode(number)).messages), told.asks

    return draw


def _nano(point: CurvePoint, seed: int) -> _Draw:
    def draw(number: int) -> tuple[tuple[Message, ...], Sequence[Ask]]:
        rng = Random(f"{point.key}/{seed}/{number}")
        bindings = draw_bindings(rng, point.facts)
        turns = [tell(rng, binding) for binding in bindings] + [filler(rng) for _ in range(point.turns)]
        told = [message for said, reply in turns for message in (Message("user", said), Message("assistant", reply))]
        return tuple(told), [_asked(rng, binding) for binding in rng.sample(bindings, min(_QUESTIONS, len(bindings)))]

    return draw


def _asked(rng: Random, binding: Binding) -> Ask:
    question, reply = Message("user", ask(rng, binding.attribute)), Message("assistant", answer(binding))
    return Ask((question,), reply, (binding.value,), kind="ask", check=partial(_is_right, binding))


def _is_right(binding: Binding, reply: str) -> bool:
    return is_correct(reply, binding)


def run_curves(
    load: Callable[[], Engine],
    out: Path,
    *,
    points: Sequence[str] = tuple(POINTS),
    limit: int = LIMIT,
    arms: Sequence[Arm] = CONTROLLED,
    seed: int = SEED,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure points, and write `results.json`, `report.md` and `predictions/POINT.jsonl` below `out`.

    A run that was interrupted is continued. The results are written after each point.

    Args:
        load: loads the engine, which is closed at the end.
        out: the directory of the results.
        points: keys of `POINTS`.
        limit: questions at a point.
        arms: which arms are measured.
        seed: conversations are drawn from it.
        on_progress: is given the point's key, and the numbers of replies made and wanted.

    Returns:
        The content of `results.json`.

    Raises:
        ConfigError: a point or an arm is unknown, or the limit is not 1 or more.
        MissingAdapterError: the engine has no memory, and an arm needs one.
    """
    if unknown := [key for key in points if key not in POINTS]:
        raise ConfigError(f"points of curves are {', '.join(POINTS)}; found {', '.join(unknown)}")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ConfigError(f"arms are {', '.join(ARMS)}; found {', '.join(unknown)}")
    if limit < 1:
        raise ConfigError(f"a point needs 1 question or more; found {limit}")
    started = time.monotonic()
    with load() as engine:
        vocabulary = None if engine.name == "nano" else Vocabulary.from_tokenizer(engine.tokenizer)
        results: dict[str, Any] = {
            "task": "curves",
            "model": engine.name,
            "model_fingerprint": engine.model_fingerprint,
            "adapter_fingerprint": engine.adapter_fingerprint,
            "seed": seed,
            "limit": limit,
            "seconds": 0,
            "points": [],
        }
        for point in (POINTS[key] for key in points):
            measured = measure(
                engine,
                point_probes(point, limit, seed, vocabulary),
                arms,
                predictions=out / "predictions" / f"{point.key}.jsonl",
                labels={"point": point.key, "seed": seed},
                on_progress=on_progress and partial(on_progress, point.key),
            )
            shares = {str(arm): measured.share(arm) for arm in measured.arms}
            row = {arm: {"share": share.value, **asdict(share)} for arm, share in shares.items()}
            results["points"].append({"curve": point.curve, "place": point.place, "arms": row})
            results["seconds"] = round(time.monotonic() - started)
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            (out / "report.md").write_text(f"# How {engine.name} forgets\n\n{curves_table(results)}\n", "utf-8")
    return results


AXES = {"fading": "messages since the fact was told", "filling": "facts told"}
"""The axis of each curve."""


def curves_table(results: dict[str, Any]) -> str:
    """The results as Markdown, a table for each curve."""
    lines = [
        "Share of right replies (95 % interval over conversations). `memory`, `zero`, `foreign` and `bare` "
        "see nothing of the conversation."
    ]
    for curve, axis in AXES.items():
        rows = [row for row in results["points"] if row["curve"] == curve]
        if not rows:
            continue
        arms = list(rows[0]["arms"])
        lines += ["", f"| {axis} | {' | '.join(arms)} | questions |", "|---" * (len(arms) + 2) + "|"]
        for row in rows:
            cells = [f"{row['arms'][arm]['share']:.3f} ({_range(row['arms'][arm])})" for arm in arms]
            lines.append(f"| {row['place']} | {' | '.join(cells)} | {row['arms'][arms[0]]['questions']} |")
    return "\n".join(lines)


def _range(share: dict[str, Any]) -> str:
    return f"{share['low']:.2f}-{share['high']:.2f}"
