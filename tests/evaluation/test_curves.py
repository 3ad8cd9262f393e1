"""Fading and filling: what a point tells and asks, in both languages, and a run by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentmem import Message
from agentmem.errors import ConfigError
from agentmem.evaluation.curves import POINTS, curves_table, point_probes, run_curves
from agentmem.training.facts.values import Vocabulary
from agentmem.training.judging import contains, judge
from agentmem_cli.app import app


@pytest.mark.parametrize("words", [Vocabulary(), None], ids=["english", "nano"])
@pytest.mark.parametrize("key", ["fading-1", "fading-9", "fading-513", "filling-1", "filling-8", "filling-32"])
def test_a_point_asks_for_what_was_told(key: str, words: Vocabulary | None) -> None:
    point, limit = POINTS[key], 6
    probes = point_probes(point, limit, 3, words)
    assert len(probes) >= limit
    assert probes[0].told == point_probes(point, limit, 3, words)[0].told
    assert len({probe.conversation for probe in probes}) > 1
    for probe in probes:
        told = [message for message in probe.told if message.role != "system"]
        assert len(told) == 2 * (point.facts + point.turns)
        (value,) = probe.ask.values
        first = next(place for place, message in enumerate(told) if contains(message.content, value))
        if point.curve == "fading":
            assert first == 0
            assert len(told) - 1 == point.place
        assert judge(probe.ask, probe.ask.reply).right
        assert not judge(probe.ask, Message("assistant", "I do not know.")).right


def test_nano_fills_before_it_fades_away(tmp_path: Path) -> None:
    command = ["evaluate", "--task", "curves", "--cells", "fading-3,filling-1,filling-16", "--limit", 8]
    command += ["--out", tmp_path / "out", "--plot", tmp_path / "curves.png"]
    finished = CliRunner().invoke(app, [str(part) for part in command])
    assert finished.exit_code == 0, finished.output
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert [(row["curve"], row["place"]) for row in results["points"]] == [
        ("fading", 3),
        ("filling", 1),
        ("filling", 16),
    ]
    near, one, many = (row["arms"] for row in results["points"])
    assert list(near) == ["memory", "zero", "foreign"]
    assert near["memory"]["share"] > 0.8 > 0.3 > near["zero"]["share"]
    assert one["memory"]["share"] > 0.8
    assert one["memory"]["share"] >= many["memory"]["share"]
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert curves_table(results) in report
    assert "| messages since the fact was told | memory | zero | foreign | questions |" in report
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_unknown_points_and_company_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"points of curves are fading-1, .*found fading-2"):
        run_curves(lambda: pytest.fail("loaded"), tmp_path, points=["fading-2"])
    finished = CliRunner().invoke(app, ["evaluate", "--task", "curves,facts"])
    assert isinstance(finished.exception, ConfigError)
    assert "curves is measured alone" in str(finished.exception)
