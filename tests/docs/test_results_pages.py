"""The command that makes the results: what it runs, and the pages that it writes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from agentmem.evaluation.report import BEGIN, END
from agentmem.evaluation.tasks import FOLDERS
from agentmem.training.contexts import ARMS

results: Any = import_module("benchmarks.results")
PAGES = Path(__file__).parents[2] / "docs" / "results"


def test_all_steps_fit_into_six_hours_and_have_a_place_on_their_page() -> None:
    assert sum(step.minutes for steps in results.STEPS.values() for step in steps) <= 2 * 6 * 60
    for model, steps in results.STEPS.items():
        page = (PAGES / f"{model}_tasks.md").read_text("utf-8")
        places = [page.index(f"## {step.task}\n") for step in steps]
        assert places == sorted(places)
        for step in steps:
            assert step.data == (step.task in FOLDERS)
            assert set(step.arms.split(",")) <= {*ARMS, ""}


def test_a_page_has_the_reports_that_are_there(tmp_path: Path) -> None:
    page = tmp_path / "nano_tasks.md"
    page.write_text(f"# nano\n\n{BEGIN}\nold\n{END}\n\nThe end.\n", "utf-8")
    done = tmp_path / "out" / "nano" / "leak"
    done.mkdir(parents=True)
    (done / "report.md").write_text("# What a rewind leaves\n\nSome table.\n", "utf-8")
    (done / "plot.png").write_bytes(b"a picture")
    results.write_page("nano", tmp_path / "out", tmp_path)
    assert page.read_text("utf-8") == (
        f"# nano\n\n{BEGIN}\n## curves\n\nNot run yet: `python -m benchmarks.results nano --only curves`.\n\n"
        "## leak\n\nSome table.\n\n![Right replies by arm, with intervals: leak](nano_leak.png)\n"
        f"{END}\n\nThe end.\n"
    )
    assert (tmp_path / "nano_leak.png").read_bytes() == b"a picture"


def test_what_cannot_be_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["pico"], "models are nano, smollm2; found pico"),
        (["nano", "--only", "sgd"], "no step of nano is called sgd"),
        (["smollm2", "--only", "sgd"], "name it (--data-dir)"),
    ):
        with pytest.raises(SystemExit):
            results.main(arguments)
        assert message in capsys.readouterr().err
