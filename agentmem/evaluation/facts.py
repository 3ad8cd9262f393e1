"""The `facts` task: how much a memory of any chat model holds, told in natural English, in the cells of one table.

A cell is a number of conversations of `agentmem.training.episodes` that no training run draws, with one thing varied:
the number of facts, wordings or values that training never sees, other talk in between, a change, a rule. Every
question is asked with nothing of the conversation in the prompt, with the conversation's memory and with controls
(`agentmem.training.arms`). A cell has bars for the memory and limits for its controls, or none where it only informs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

from agentmem.engine import Engine
from agentmem.errors import ConfigError
from agentmem.training.arms import Writing, measure, probes_of
from agentmem.training.contexts import ARMS, Arm
from agentmem.training.conversations import Conversation
from agentmem.training.episodes import EpisodeConfig, FactEpisode, FactEpisodes
from agentmem.training.facts.splits import Split
from agentmem.training.facts.values import OPEN_KIND, POOLS, Vocabulary
from agentmem.training.intervals import Share
from agentmem.training.predictions import ArmResults
from agentmem.training.sources import as_conversation

SEED = 20_261_130
"""Where the cells' conversations are drawn from. Training refuses no seed, so take another one there."""

_ONE_WORD = ("word", "name", *(kind for kind, opened in OPEN_KIND.items() if opened in ("word", "name")))
_TWO_WORDS = (*_ONE_WORD, "title")
_LATER = 3  # turns between a rule and the question that it applies to


def _config(facts: int, **options: Any) -> EpisodeConfig:
    """Only facts and questions about them, unless the options say otherwise."""
    plain: dict[str, Any] = {"fillers": (0, 0), "changes": 0.0, "rules": 0.0, "acts": (("ask", 1.0),)}
    return EpisodeConfig(facts=(facts, facts), **plain | options)


@dataclass(frozen=True)
class FactsCell:
    """A cell of the table.

    Attributes:
        key: a short name for files and for choosing cells.
        title: what a reader is told.
        config: what is told and asked.
        values, wordings, attributes: the parts that they are drawn from; "heldout" = never in training.
        words: how many words each value must have; 0 = any number.
        bar: the least share of right replies that the memory must reach; None = the cell only informs.
        at_most: the largest shares that other arms may reach.
        old_at_most: the largest share of the memory's replies that may name a value that was changed.
        fillers: turns of other talk between the last fact and the questions.
        restart: whether the questions are asked by a new engine, from states in JSON.
        arms: which arms are measured.
    """

    key: str
    title: str
    config: EpisodeConfig
    values: Split = "train"
    wordings: Split = "train"
    attributes: Split = "train"
    words: int = 0
    bar: float | None = None
    at_most: dict[Arm, float] = field(default_factory=dict)
    old_at_most: float | None = None
    fillers: int = 0
    restart: bool = False
    arms: tuple[Arm, ...] = ("memory", "zero", "foreign")

    def conversations(self, questions: int, seed: int, vocabulary: Vocabulary) -> list[Conversation]:
        """The first conversations that have at least so many questions together."""
        taken: list[Conversation] = []
        asked = 0
        for conversation in self._draw(seed, vocabulary):
            taken.append(conversation)
            asked += len(conversation.asks)
            if asked >= questions and len(taken) > 1:  # two at least: a foreign memory is that of another conversation
                break
        return taken

    def _draw(self, seed: int, vocabulary: Vocabulary) -> Iterator[Conversation]:
        parts: dict[str, Any] = {
            "values": self.values,
            "wordings": self.wordings,
            "attributes": self.attributes,
            "vocabulary": vocabulary,
        }
        source = FactEpisodes(seed, self.config, **parts)
        fillers = self.fillers or _LATER
        talk = FactEpisodes(seed + 1, _config(0, fillers=(fillers, fillers)), **parts)
        for number in count():
            episode = source.episode(number)
            values = {fact.value for turn in episode.turns for fact in turn.facts}
            if self.words and any(len(value.split()) != self.words for value in values):
                continue
            turns, questions = list(episode.turns), list(episode.questions)
            other = talk.episode(number).turns
            if self.config.rules:  # the rule first, and exactly `_LATER` turns after it
                rule = next(turn for turn in turns if turn.act == "rule")
                turns = [rule, *[*(turn for turn in turns if turn is not rule), *other][:_LATER]]
            elif self.fillers:
                turns += other
            if self.config.changes:
                questions = [question for question in questions if question.old]
            yield as_conversation(FactEpisode(tuple(turns), tuple(questions)), f"{self.key}:{number}")


def _cells() -> Iterator[FactsCell]:
    known: dict[str, Any] = {"kinds": tuple(POOLS), "open_values": 0.0, "two_words": 0.0}
    limits: dict[Arm, float] = {"zero": 0.02, "foreign": 0.08}
    for facts, bar in ((1, 0.98), (2, 0.98), (4, 0.95), (8, 0.85)):
        title = f"{_number(facts)}, values known from training"
        yield FactsCell(f"known-{facts}", title, _config(facts, **known), bar=bar, at_most=limits)
    yield FactsCell(
        "wordings-2",
        "2 facts, wordings of telling and asking never seen",
        _config(2, **known),
        wordings="heldout",
        bar=0.92,
        at_most=limits,
    )
    limits = {"zero": 0.02, "foreign": 0.03}
    kinds: tuple[tuple[str, str, tuple[str, ...], int, tuple[float, ...]], ...] = (
        ("word", "one word or name", _ONE_WORD, 1, (0.95, 0.88, 0.75)),
        ("number", "numbers of 2 to 4 digits", ("number",), 1, (0.98, 0.85, 0.65)),
        ("two-words", "two words", _TWO_WORDS, 2, (0.75, 0.55, 0.40)),
    )
    for key, name, of_kinds, words, bars in kinds:
        for facts, bar in zip((1, 2, 4), bars, strict=True):
            yield FactsCell(
                f"{key}-{facts}",
                f"{_number(facts)}, values never seen: {name}",
                _config(facts, kinds=of_kinds, open_values=1.0, two_words=float(words == 2)),
                values="heldout",
                words=words,
                bar=bar,
                at_most=limits,
            )
    yield FactsCell(
        "restart-2",
        "2 facts, then 16 messages of other talk, then a restart",
        _config(2, **known),
        bar=0.90,
        fillers=8,  # a turn has two messages
        restart=True,
    )
    yield FactsCell(
        "changed", "a changed fact: its new value", _config(2, changes=1.0, **known), bar=0.90, old_at_most=0.03
    )
    yield FactsCell(
        "never-told",
        "asked for what was never told: says so",
        _config(2, acts=(("never_told", 1.0),), questions=1),
        bar=0.80,
    )
    yield FactsCell(
        "rule",
        f"a rule told once is followed {_LATER} turns later",
        _config(1, rules=1.0, questions=1),
        bar=0.80,
        at_most={"bare": 0.20},
        arms=("memory", "zero", "foreign", "bare"),
    )
    yield FactsCell("any-2", "2 facts, values of every kind known from training", _config(2))
    yield FactsCell("any-unseen-2", "2 facts, values of every kind never seen", _config(2), values="heldout")
    yield FactsCell(
        "attributes-2", "2 facts, attributes never seen", _config(2), attributes="heldout", wordings="heldout"
    )
    yield FactsCell("choice-2", "2 facts, a choice between two values", _config(2, acts=(("choice", 1.0),), **known))


def _number(facts: int) -> str:
    return "1 fact" if facts == 1 else f"{facts} facts"


CELLS = {cell.key: cell for cell in _cells()}
"""All cells, by key, in the order of the table."""


@dataclass(frozen=True)
class CellResult:
    """A measured cell: each arm's share, the gain over the controls, and the bars that are missed."""

    cell: FactsCell
    shares: dict[Arm, Share]
    prompt_tokens: dict[Arm, float]
    old_named: Share | None
    gain: tuple[float, float, float] | None
    missed: tuple[str, ...]

    @classmethod
    def of(cls, cell: FactsCell, results: ArmResults) -> CellResult:
        """Judge the predictions of a cell."""
        shares = {arm: results.share(arm) for arm in results.arms}
        old_named = None
        if cell.config.changes and "memory" in shares:
            old_named = results.share_naming_forbidden("memory")
        missed = []
        if cell.bar is not None and "memory" in shares and shares["memory"].value < cell.bar:
            missed.append(f"{cell.title}: {shares['memory'].value:.3f}, bar {cell.bar:.2f}")
        for arm, most in cell.at_most.items():
            if arm in shares and shares[arm].value > most:
                missed.append(f"{cell.title}: {arm} {shares[arm].value:.3f}, at most {most:.2f}")
        if old_named is not None and cell.old_at_most is not None and old_named.value > cell.old_at_most:
            missed.append(f"{cell.title}: the old value {old_named.value:.3f}, at most {cell.old_at_most:.2f}")
        controlled = {"memory", "zero", "foreign"} <= set(shares)
        gain = (results.gain.value, results.gain.low, results.gain.high) if controlled else None
        tokens = {arm: results.prompt_tokens(arm) for arm in results.arms}
        return cls(cell, shares, tokens, old_named, gain, tuple(missed))

    def plain(self) -> dict[str, Any]:
        """As plain data for a JSON file."""
        return {
            "cell": self.cell.key,
            "title": self.cell.title,
            "bar": self.cell.bar,
            "at_most": self.cell.at_most,
            "old_at_most": self.cell.old_at_most,
            "arms": {
                arm: {"share": s.value, **asdict(s), "prompt_tokens": round(self.prompt_tokens[arm], 1)}
                for arm, s in self.shares.items()
            },
            "old_named": None if self.old_named is None else {"share": self.old_named.value, **asdict(self.old_named)},
            "gain": None if self.gain is None else dict(zip(("value", "low", "high"), self.gain, strict=True)),
            "missed": list(self.missed),
        }


def run_facts(
    load: Callable[[], Engine],
    out: Path,
    *,
    cells: Sequence[str] = tuple(CELLS),
    limit: int = 200,
    arms: Sequence[Arm] | None = None,
    seed: int = SEED,
    writing: Writing = "remember",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure cells, and write `results.json`, `report.md` and `predictions/CELL.jsonl` below `out`.

    A run that was interrupted is continued: predictions in the files are not made again. The results are written after
    each cell.

    Args:
        load: loads the engine; called again for cells with a restart. Engines are closed at the end.
        out: the directory of the results.
        cells: keys of `CELLS`.
        limit: least number of questions in a cell.
        arms: which arms are measured instead of those that each cell names.
        seed: conversations are drawn from it.
        writing: see `agentmem.training.arms.measure`.
        on_progress: is given the cell's title, and the numbers of replies made and wanted.

    Returns:
        The content of `results.json`.

    Raises:
        ConfigError: a cell is unknown, or the limit is not 1 or more.
        MissingAdapterError: the engine has no memory, and an arm needs one.
    """
    if unknown := [key for key in cells if key not in CELLS]:
        raise ConfigError(f"cells are {', '.join(CELLS)}; found {', '.join(unknown)}")
    if unknown := [arm for arm in arms or () if arm not in ARMS]:
        raise ConfigError(f"arms are {', '.join(ARMS)}; found {', '.join(unknown)}")
    if limit < 1:
        raise ConfigError(f"a cell needs 1 question or more; found {limit}")
    started = time.monotonic()
    done: list[CellResult] = []
    with ExitStack() as engines:
        engine = engines.enter_context(load())
        vocabulary = Vocabulary.from_tokenizer(engine.tokenizer)
        facts: dict[str, Any] = {
            "task": "facts",
            "model": engine.name,
            "model_fingerprint": engine.model_fingerprint,
            "adapter_fingerprint": engine.adapter_fingerprint,
            "seed": seed,
            "limit": limit,
            "writing": writing,
        }
        results = facts | {"cells": []}
        for cell in (CELLS[key] for key in cells):
            measured = measure(
                engine,
                probes_of(cell.conversations(limit, seed, vocabulary)),
                cell.arms if arms is None else arms,
                writing=writing,
                predictions=out / "predictions" / f"{cell.key}.jsonl",
                labels={"cell": cell.key, "seed": seed},
                asker=(lambda: engines.enter_context(load())) if cell.restart else None,
                on_progress=on_progress and partial(on_progress, cell.title),
            )
            done.append(CellResult.of(cell, measured))
            results = facts | {"seconds": round(time.monotonic() - started), "cells": [r.plain() for r in done]}
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            (out / "report.md").write_text(f"# Facts held by {engine.name}\n\n{facts_table(results)}\n", "utf-8")
    return results


def facts_table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    arms = list(dict.fromkeys(arm for row in results["cells"] for arm in row["arms"]))
    lines = [
        "Share of right replies (95 % interval over conversations). `memory`, `zero`, `foreign` and `bare` "
        "see nothing of the conversation.",
        "",
        f"| | bar | {' | '.join(arms)} | memory above controls | questions |",
        "|---" * (len(arms) + 4) + "|",
    ]
    for row in results["cells"]:
        shares = [_share(row["arms"].get(arm), row["at_most"].get(arm)) for arm in arms]
        bar = "" if row["bar"] is None else f"{row['bar']:.2f}"
        above = "" if row["gain"] is None else f"{row['gain']['value']:.3f} ({_range(row['gain'])})"
        asked = max((share["questions"] for share in row["arms"].values()), default=0)
        lines.append(f"| {row['title']} | {bar} | {' | '.join(shares)} | {above} | {asked} |")
        if row["old_named"] is not None:
            old = _share(row["old_named"], row["old_at_most"])
            first = f"| the same: the old value is named | | {old} "
            lines.append(first + "| " * (len(arms) - 1) + f"| | {row['old_named']['questions']} |")
    tokens = {
        arm: [row["arms"][arm]["prompt_tokens"] for row in results["cells"] if arm in row["arms"]] for arm in arms
    }
    means = " | ".join(f"{fmean(of_arm):.0f}" for of_arm in tokens.values())
    lines.append(f"| prompt tokens, mean over the rows | | {means} | | |")
    missed = [text for row in results["cells"] for text in row["missed"]]
    lines += ["", *(f"- falls short: {text}" for text in missed)] if missed else []
    return "\n".join(lines)


def _share(share: dict[str, Any] | None, most: float | None) -> str:
    if share is None:
        return ""
    limit = "" if most is None else f", at most {most:.2f}"
    return f"{share['share']:.3f} ({_range(share)}){limit}"


def _range(interval: dict[str, Any]) -> str:
    return f"{interval['low']:.2f}-{interval['high']:.2f}"
