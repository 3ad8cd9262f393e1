"""The table of the `facts` task: what its cells hold, how they are judged, and a run by the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentmem import Engine, Message
from agentmem.errors import ConfigError
from agentmem.evaluation.facts import CELLS, SEED, CellResult, FactsCell, facts_table, run_facts
from agentmem.training.contexts import Arm
from agentmem.training.facts import wordings as say
from agentmem.training.facts.rules import RULES
from agentmem.training.facts.splits import split_of, wordings
from agentmem.training.facts.values import POOLS, Vocabulary
from agentmem.training.judging import contains, judge
from agentmem.training.predictions import ArmResults, Prediction
from agentmem_cli.app import app
from tests.helpers.chatterer import save_chatterer

WORDS = Vocabulary()


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_cells_ask_what_was_told(cell: FactsCell) -> None:
    conversations = cell.conversations(24, SEED, WORDS)
    assert sum(len(c.asks) for c in conversations) >= 24
    assert conversations == cell.conversations(24, SEED, WORDS)
    for conversation in conversations:
        told = "\n".join(m.content for m in conversation.messages if m.role == "user")
        for ask in conversation.asks:
            assert judge(ask, ask.reply).right, ask.reply
            if ask.kind == "rule_followed":  # a file name by the rule was told by nobody
                continue
            assert all(contains(told, value) for value in ask.values)
            assert bool(ask.values) == (ask.kind != "never_told")
            if ask.kind != "choice":
                assert not any(contains(ask.messages[0].content, value) for value in ask.values)
                assert all(contains(told, value) for value in ask.forbidden)


def values_of(key: str) -> list[str]:
    return [value for c in CELLS[key].conversations(60, SEED, WORDS) for ask in c.asks for value in ask.values]


def test_values_are_known_or_never_seen_as_the_row_says() -> None:
    pooled = {value for values in POOLS.values() for value in values}
    assert set(values_of("known-4")) <= pooled
    for key in ("word-1", "word-4"):
        assert all(len(value.split()) == 1 and split_of(value, "value") == "heldout" for value in values_of(key))
    numbers = values_of("number-2")
    assert {len(number) for number in numbers} == {2, 3, 4}
    assert all(number.isdigit() and split_of(number, "value") == "heldout" for number in numbers)
    pairs = values_of("two-words-2")
    assert all(len(value.split()) == 2 for value in pairs)
    for word in {word for value in pairs for word in value.split()}:  # a title's words are capitalised ones
        assert "heldout" in (split_of(word, "value"), split_of(word.lower(), "value"))


def test_held_out_wordings_are_never_those_of_training() -> None:
    def pattern(wording: str) -> str:
        return re.sub(r"\\{\w+\\}", ".+", re.escape(wording))

    trained = [pattern(text) for text in wordings(say.TELL, "train") if text.count("{") == 2]
    trained = [text for text in trained if not text.startswith(".+")]  # with an opening in front, these match anything
    assert len(trained) > 10
    for conversation in CELLS["wordings-2"].conversations(60, SEED, WORDS):
        users = [m.content for m in conversation.messages if m.role == "user"]
        assert not any(re.fullmatch(text, user) for text in trained for user in users)


def test_other_talk_and_rules_are_as_far_away_as_the_row_says() -> None:
    for conversation in CELLS["restart-2"].conversations(20, SEED, WORDS):
        users = [m.content for m in conversation.messages if m.role == "user"]
        talk = {text for text, _ in (*say.SMALL_TALK, *say.QUESTIONS)}
        assert all(text in talk for text in users[-8:])
        assert not any(text in talk for text in users[:-8])
    for conversation in CELLS["rule"].conversations(20, SEED, WORDS):
        rule, *later = [m for m in conversation.messages if m.role == "user"]
        assert len(later) == 3
        tellings = [telling.partition("{v}")[0] for r in RULES for telling in r.tellings]
        assert rule.content.startswith(tuple(tellings))
        assert not any(m.content.startswith(tuple(tellings)) for m in later)
    assert all(ask.forbidden for c in CELLS["changed"].conversations(20, SEED, WORDS) for ask in c.asks)


def made(arm: Arm, right: int, of: int, *, old: int = 0) -> list[Prediction]:
    return [
        Prediction(f"{arm}{n}", arm, n, "ask", "?", ("x",), (), Message("assistant", "x"), 9, n < right, n < old)
        for n in range(of)
    ]


def test_missed_bars_and_limits_are_named() -> None:
    def missed(key: str, *predictions: list[Prediction]) -> list[str]:
        return list(CellResult.of(CELLS[key], ArmResults(tuple(p for many in predictions for p in many))).missed)

    good = [made("memory", 98, 100), made("zero", 2, 100), made("foreign", 8, 100)]
    assert missed("known-1", *good) == []
    low = missed("known-1", made("memory", 97, 100), made("zero", 3, 100), made("foreign", 9, 100))
    assert [text.partition(": ")[2] for text in low] == [
        "0.970, bar 0.98",
        "zero 0.030, at most 0.02",
        "foreign 0.090, at most 0.08",
    ]
    assert missed("changed", made("memory", 95, 100, old=3)) == []
    assert missed("changed", made("memory", 95, 100, old=4)) == [
        "a changed fact: its new value: the old value 0.040, at most 0.03"
    ]
    assert missed("rule", made("memory", 90, 100), made("bare", 21, 100))
    assert missed("any-2", made("memory", 0, 100)) == []


@pytest.fixture(scope="module")
def chatterer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chatterer(tmp_path_factory.mktemp("chatterer"))


def test_a_table_by_the_command(chatterer: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    command = ["evaluate", "--task", "facts", "--model", str(chatterer), "--limit", "4", "--out", str(tmp_path)]
    cells = ["--cells", "known-2,restart-2,changed,rule,any-2", "--page", str(page)]
    cells += ["--plot", str(tmp_path / "cells.png")]
    done = CliRunner().invoke(app, [*command, *cells])
    assert done.exit_code == 1, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    by_key = {row["cell"]: row for row in results["cells"]}
    assert list(by_key) == ["known-2", "restart-2", "changed", "rule", "any-2"]
    assert set(by_key["rule"]["arms"]) == {"memory", "zero", "foreign", "bare"}
    assert by_key["known-2"]["arms"]["memory"]["questions"] == 4
    assert by_key["changed"]["old_named"]["questions"] == 4
    report = (tmp_path / "report.md").read_text()
    assert "| 2 facts, values known from training | 0.98 | 0.000 (" in report
    assert re.search(r"\| prompt tokens, mean over the rows \| \| \d+ \| \d+ ", report)
    assert "falls short: 2 facts, values known from training: 0.000, bar 0.98" in report
    assert facts_table(results) in page.read_text()
    assert (tmp_path / "cells.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (tmp_path / "predictions" / "rule.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 4
    assert {(row["cell"], row["seed"]) for row in rows} == {("rule", SEED)}
    # A cell without a bar does not fail the command; and nothing that was asked is asked again.
    before = (tmp_path / "predictions" / "any-2.jsonl").read_text()
    assert CliRunner().invoke(app, [*command, "--cells", "any-2"]).exit_code == 0
    assert (tmp_path / "predictions" / "any-2.jsonl").read_text() == before


def test_what_does_not_fit_is_refused(chatterer: Path, tmp_path: Path) -> None:
    def opened() -> Engine:
        raise AssertionError("the model was loaded")

    with pytest.raises(ConfigError, match=r"cells are known-1, .*found known-3"):
        run_facts(opened, tmp_path, cells=("known-3",))
    with pytest.raises(ConfigError, match="1 question or more"):
        run_facts(opened, tmp_path, limit=0)
    with pytest.raises(ConfigError, match=r"arms are memory, zero, .*found zeroed"):
        run_facts(opened, tmp_path, arms=("zeroed",))  # type: ignore[arg-type]
    command: list[Any] = ["evaluate", "--model", str(chatterer)]
    done = CliRunner().invoke(app, [*command, "--limit", "3"])
    assert "--limit is no option of --task recall" in str(done.exception)
    done = CliRunner().invoke(app, [*command, "--task", "facts", "--data-dir", "x"])
    assert "--data-dir is no option of --task facts" in str(done.exception)
    done = CliRunner().invoke(app, [*command, "--task", "facts,recall"])
    assert "recall is measured alone" in str(done.exception)
