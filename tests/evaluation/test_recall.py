"""The measurement itself: what is asked, how it is counted, and what the report says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest

import agentmem
from agentmem import Engine
from agentmem.evaluation.recall import ARMS, CELLS, MEMORY_ARMS, Cell, measure
from agentmem.evaluation.report import BEGIN, END, details, markdown, missed_bars, plot, put_into
from agentmem.evaluation.runner import Setup, plan, run, save
from agentmem.nano.recipe.language import draw_bindings
from agentmem.training.intervals import gain, holm, mean, ratio, share


@pytest.fixture(scope="module")
def nano() -> Iterator[Engine]:
    with agentmem.load("nano") as engine:
        yield engine


def test_intervals_come_from_conversations() -> None:
    alone = share([(1, 1), (0, 1)] * 200)
    assert alone.value == 0.5
    assert 0.4 < alone.low < 0.5 < alone.high < 0.6
    # Four hundred questions in four conversations say less than in four hundred.
    together = share([(100, 100), (0, 100), (100, 100), (0, 100)])
    assert together.high - together.low > 3 * (alone.high - alone.low)
    assert share([(5, 5)] * 40).high == 1.0
    assert 0.9 < share([(5, 5)] * 40).low < 1.0
    assert share([(0, 5)] * 40).high < 0.1
    with pytest.raises(ValueError, match="at least one question"):
        share([])


def test_differences_have_p_values_that_few_conversations_cannot_make_small() -> None:
    clear = gain([(1, 1)] * 40, [[(0, 1)] * 40])
    assert clear.p < 0.01
    assert gain([(1, 1)] * 3, [[(0, 1)] * 3]).p == 0.25
    assert gain([(1, 1), (0, 1)] * 20, [[(0, 1), (1, 1)] * 20]).p > 0.5
    assert holm([0.01, 0.04, 0.03, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.2])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_means_and_ratios_have_intervals_over_conversations() -> None:
    scores = mean([(1.5, 2), (0.0, 1)] * 50)
    assert scores.value == 0.5
    assert 0.4 < scores.low < 0.5 < scores.high < 0.6
    half = ratio([(1, 2), (0, 2)] * 50, [(2, 2), (0, 2)] * 50)
    assert half is not None
    assert (half.value, half.low, half.high) == (0.5, 0.5, 0.5)  # paired: half of it in every sample
    assert ratio([(1, 2)], [(0, 2)]) is None


def test_every_cell_gets_its_questions() -> None:
    jobs = plan(1000, 200, seed=1)
    assert {job.cell for job in jobs} == set(CELLS)
    assert len({(job.cell, job.seed) for job in jobs}) == len(jobs)
    for cell in CELLS:
        asked = len(cell.questions(Random(0), draw_bindings(Random(0), cell.bindings)))
        assert asked >= 8
        for arm in ARMS:
            questions = asked * sum(job.arms[arm] for job in jobs if job.cell == cell)
            assert questions >= (1000 if cell.bar is not None and arm in MEMORY_ARMS else 200)


def test_the_arms_differ_only_in_what_they_may_know(nano: Engine) -> None:
    counts = list(measure(nano, Cell(2, 1), 3, seed=5, arms=dict.fromkeys(ARMS, 3)))
    right = {arm: sum(c[arm][0] for c in counts) for arm in ARMS}
    asked = {arm: sum(c[arm][1] for c in counts) for arm in ARMS}
    assert set(asked.values()) == {24}
    assert right["memory"] >= 20
    assert right["whole"] >= 18
    assert max(right[arm] for arm in ("window", "zeroed", "foreign")) <= 4


def test_a_run_is_repeatable_and_reported(nano: Engine, tmp_path: Path) -> None:
    jobs = plan(8, 8, seed=3, cells=[Cell(1, 0), Cell(2, 0)])
    done: list[int] = []
    results = run(jobs, Setup("nano", None, threads=1), 1, lambda finished, total: done.append(finished))
    assert done == [1, 2]
    job = jobs[-1]
    again = list(measure(nano, job.cell, job.conversations, job.seed, job.arms))
    (row,) = (row for row in results["cells"] if row["bindings"] == job.cell.bindings)
    for arm in ARMS:
        assert row[arm] == asdict(share([counts[arm] for counts in again])), "another process counts the same"
    save(results, tmp_path / "deep" / "results.json")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    put_into(page, markdown(results))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert "| 1 | " in text
    assert details(results).count("\n| 1 | 0 | ") == 1
    plot(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    page.write_text("no marks")
    with pytest.raises(ValueError, match="no place for results"):
        put_into(page, "table")
    assert page.read_text() == "no marks"


def test_missed_bars_are_named() -> None:
    low = {"right": 90, "questions": 100, "low": 0.8, "high": 0.95}
    cells = [
        {"bindings": 4, "fillers": 4, "bar": 0.98, "memory": low},
        {"bindings": 4, "fillers": 64, "bar": None, "memory": low},
        {"bindings": 4, "fillers": 16, "bar": 0.9, "memory": low},
    ]
    assert missed_bars({"cells": cells}) == ["4 bindings, 4 fillers: 0.900, bar 0.98"]
