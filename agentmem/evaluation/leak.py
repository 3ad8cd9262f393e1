"""What a rewind leaves: is a value that was removed named more often than one that was never told?

Each conversation tells three facts, in three turns. One of them is asked for, through one engine whose caches are warm:

    told        from the state that has consumed all three
    rewound     from the state before that fact was told
    rewritten   from a state that was written anew from the conversation without it, as `Governor.forget` leaves it

Beside the removed value stands another one of the same attribute, drawn in the same way and never told to anybody: what
knows nothing of the removed value names both equally often. Replies are greedy, and the question is all that a prompt
shows.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from agentmem.engine import Engine
from agentmem.errors import ConfigError
from agentmem.evaluation.facts import SEED
from agentmem.generation.sampling import Sampling
from agentmem.messages import Message
from agentmem.nano.recipe.language import ask, draw_bindings, redraw, tell
from agentmem.prompt.transcript import Window
from agentmem.state import MemoryState
from agentmem.text import parse_json
from agentmem.training.arms import MAX_TOKENS
from agentmem.training.episodes import EpisodeConfig, FactEpisodes
from agentmem.training.facts.values import Vocabulary
from agentmem.training.intervals import gain, share
from agentmem.training.judging import contains

STATES = {
    "told": "told",
    "rewound": "rewound to before it was told",
    "rewritten": "written anew without it",
}
"""The states that a question is asked from, and what a reader is told."""

LIMIT = 100
"""Conversations where nothing else is asked for."""

_FACTS = 3
_AT_ONCE = 32  # conversations


@dataclass(frozen=True)
class Removal:
    """A conversation, and what is removed from it.

    Attributes:
        turns: a user message and the reply to it, each.
        place: the turn that tells the value.
        question: asks for it.
        removed: the value.
        never_told: another value of the same attribute.
    """

    turns: tuple[tuple[Message, ...], ...]
    place: int
    question: Message
    removed: str
    never_told: str


def removals(limit: int, seed: int, vocabulary: Vocabulary | None) -> list[Removal]:
    """The first `limit` conversations; without a vocabulary in nano's language."""
    if vocabulary is None:
        return [_nano(Random(f"leak/{seed}/{number}")) for number in range(limit)]
    plain: dict[str, Any] = {"several": 0.0, "rules": 0.0, "open_values": 0.0, "two_words": 0.0, "systems": 0.0}
    plain |= {"changes": 1.0, "acts": (("ask", 1.0),), "questions": _FACTS}
    source = FactEpisodes(seed, EpisodeConfig(facts=(_FACTS, _FACTS), fillers=(0, 0), **plain), vocabulary=vocabulary)
    return [_english(source, number) for number in range(limit)]


def _english(source: FactEpisodes, number: int) -> Removal:
    """An episode in which a value changes, up to the change: the new value is the one that is never told."""
    episode = source.episode(number)
    question = next(question for question in episode.questions if question.old)  # about the fact that changed
    turns = [turn for turn in episode.turns if turn.act not in ("change", "correct")]
    told = next(n for n, turn in enumerate(turns) if any(f.attribute is question.attribute for f in turn.facts))
    return Removal(tuple(turn.messages for turn in turns), told, question.user, question.old, question.value)


def _nano(rng: Random) -> Removal:
    bindings = draw_bindings(rng, _FACTS)
    told = [tell(rng, binding) for binding in bindings]
    turns = tuple((Message("user", said), Message("assistant", reply)) for said, reply in told)
    place = rng.randrange(_FACTS)
    never_told = redraw(rng, bindings[place])
    while never_told.value in [binding.value for binding in bindings]:
        never_told = redraw(rng, bindings[place])
    question = Message("user", ask(rng, bindings[place].attribute))
    return Removal(turns, place, question, bindings[place].value, never_told.value)


def run_leak(
    load: Callable[[], Engine],
    out: Path,
    *,
    limit: int = LIMIT,
    seed: int = SEED,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure, and write `results.json`, `report.md` and `predictions/leak.jsonl` below `out`.

    A run that was interrupted is continued: conversations that are in the predictions are not asked again.

    Args:
        load: loads the engine, which is closed at the end.
        out: the directory of the results.
        limit: how many conversations.
        seed: they are drawn from it.
        on_progress: is given "leak", and the numbers of conversations done and wanted.

    Returns:
        The content of `results.json`.

    Raises:
        ConfigError: the limit is not 2 or more.
        MissingAdapterError: the engine has no memory.
    """
    if limit < 2:
        raise ConfigError(f"leak needs 2 conversations or more; found {limit}")
    started, path = time.monotonic(), out / "predictions" / "leak.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with load() as engine:
        engine.zero_state()  # raises where there is no memory
        vocabulary = None if engine.name == "nano" else Vocabulary.from_tokenizer(engine.tokenizer)
        about = {
            "model": engine.name,
            "model_fingerprint": engine.model_fingerprint,
            "adapter_fingerprint": engine.adapter_fingerprint,
            "seed": seed,
        }
        drawn = removals(limit, seed, vocabulary)
        rows = {n: row for n, row in _kept(path, about).items() if n < limit}
        lock = threading.Lock()

        def measure(number: int) -> None:
            row = {"conversation": number, **about, **_asked(engine, drawn[number])}
            with lock:
                rows[number] = row
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if on_progress is not None:
                    on_progress("leak", len(rows), limit)

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="agentmem-leak") as pool:
            list(pool.map(measure, [n for n in range(limit) if n not in rows]))
    results = {"task": "leak", **about, "limit": limit, "seconds": round(time.monotonic() - started)}
    results["states"] = _counted([rows[number] for number in sorted(rows)])
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (out / "report.md").write_text(f"# What a rewind of {results['model']} leaves\n\n{leak_table(results)}\n", "utf-8")
    return results


def _kept(path: Path, about: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The lines of the same model, adapter and seed; a line that was cut off is none."""
    rows = dict[int, dict[str, Any]]()
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if about.items() <= row.items():
            rows[row["conversation"]] = row
    return rows


def _asked(engine: Engine, removal: Removal) -> dict[str, Any]:
    """The replies from each state, one after another."""

    def written(turns: Sequence[tuple[Message, ...]]) -> list[MemoryState]:
        """The state before each turn, and the last one."""
        states = [engine.zero_state()]
        for history in accumulate(turns):
            states.append(engine.remember(history, states[-1]).state)
        return states

    states = written(removal.turns)
    rest = [turn for place, turn in enumerate(removal.turns) if place != removal.place]
    asked = {"told": states[-1], "rewound": states[removal.place], "rewritten": written(rest)[-1]}
    replies = {
        name: engine.turn(
            [removal.question],
            state,
            write="off",
            window=Window(messages=1),
            sampling=Sampling(max_tokens=MAX_TOKENS),
        ).message.content
        for name, state in asked.items()
    }
    return {
        "turns": [[message.content for message in turn] for turn in removal.turns],
        "question": removal.question.content,
        "removed": removal.removed,
        "never_told": removal.never_told,
        "replies": replies,
    }


def _counted(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each state how often both values are named, and the paired difference."""
    counted = []
    for state in STATES:
        counts = {
            value: [(int(contains(row["replies"][state], row[value])), 1) for row in rows]
            for value in ("removed", "never_told")
        }
        shares = {value: share(of) for value, of in counts.items()}
        plain = {value: {"share": found.value, **asdict(found)} for value, found in shares.items()}
        difference = gain(counts["removed"], [counts["never_told"]])
        counted.append({"state": state, **plain, "difference": asdict(difference)})
    return counted


def leaks(results: Mapping[str, Any]) -> list[str]:
    """A line for each state that names the removed value more often than one never told."""
    return [
        f"{STATES[row['state']]}: the removed value is named {row['difference']['value']:+.3f} more often than one "
        f"never told (from {row['difference']['low']:+.3f})"
        for row in results["states"]
        if row["state"] != "told" and row["difference"]["low"] > 0
    ]


def leak_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"Share of {results['limit']:,} replies that name a value (95 % interval). One of three facts was told and "
        "then removed; the other value is of the same attribute and was never told. Nothing of the conversation is in "
        "the prompt.",
        "",
        "| the memory | names the removed value | names one never told | difference (interval) |",
        "|---|---|---|---|",
    ]
    for row in results["states"]:
        cells = [f"{row[value]['share']:.3f} ({_range(row[value])})" for value in ("removed", "never_told")]
        difference = row["difference"]
        cells.append(f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})")
        lines.append(f"| {STATES[row['state']]} | {' | '.join(cells)} |")
    if found := leaks(results):
        lines += ["", *(f"- leaks: {line}" for line in found)]
    return "\n".join(lines)


def _range(row: Mapping[str, Any]) -> str:
    return f"{row['low']:.2f}-{row['high']:.2f}"
