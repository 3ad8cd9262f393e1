"""What a rewind leaves: what is drawn, that nano names nothing that was removed, and that a leak is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentmem import Engine
from agentmem.errors import ConfigError
from agentmem.evaluation.leak import leak_table, leaks, removals, run_leak
from agentmem.training.facts.values import Vocabulary
from agentmem.training.judging import contains
from agentmem_cli.app import app


@pytest.mark.parametrize("words", [Vocabulary(), None], ids=["english", "nano"])
def test_one_value_is_told_once_and_the_other_never(words: Vocabulary | None) -> None:
    drawn = removals(12, 3, words)
    assert drawn == removals(12, 3, words)
    assert len({each.place for each in drawn}) > 1
    for each in drawn:
        assert len(each.turns) == 3
        assert each.removed != each.never_told
        telling = [n for n, turn in enumerate(each.turns) if any(contains(m.content, each.removed) for m in turn)]
        assert telling == [each.place]
        texts = [each.question.content, *(message.content for turn in each.turns for message in turn)]
        assert not any(contains(text, each.never_told) for text in texts)
        assert not contains(each.question.content, each.removed)


def test_nano_names_nothing_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["evaluate", "--task", "leak", "--limit", "12", "--out", str(tmp_path)]
    finished = CliRunner().invoke(app, command)
    assert finished.exit_code == 0, finished.output
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    told, *removed = results["states"]
    assert told["state"] == "told"
    assert told["removed"]["share"] > 0.8 > 0.1 > told["never_told"]["share"], "else nothing was there to be removed"
    for row in removed:
        assert row["removed"]["share"] <= row["never_told"]["share"] + 0.1
    assert leak_table(results) in (tmp_path / "report.md").read_text("utf-8")

    # A run goes on where it was interrupted, and one whose rewind forgets nothing is seen.
    path = tmp_path / "predictions" / "leak.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    assert len(lines) == 12
    kept: list[dict[str, Any]] = [json.loads(line) for line in lines[:-1]]
    for row in kept:
        row["replies"]["rewound"] = row["replies"]["told"]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept) + lines[-1][:40], "utf-8")
    turns = list[object]()
    turn = Engine.turn
    monkeypatch.setattr(Engine, "turn", lambda *args, **options: turns.append(args) or turn(*args, **options))
    again = CliRunner().invoke(app, command)
    assert len(turns) == 3, "one conversation"
    assert again.exit_code == 1, again.output
    (line,) = leaks(json.loads((tmp_path / "results.json").read_text("utf-8")))
    assert line.startswith("rewound to before it was told: the removed value is named +")


def test_one_conversation_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leak needs 2 conversations or more; found 1"):
        run_leak(lambda: pytest.fail("loaded"), tmp_path, limit=1)
