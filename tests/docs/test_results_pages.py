"""The commands that make the results: what they run, and the pages that they write."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from agentmem.delta.config import MemoryConfig
from agentmem.evaluation.facts import CELLS
from agentmem.evaluation.report import BEGIN, END, marks, put_into
from agentmem.evaluation.tasks import FOLDERS
from agentmem.training.command import from_options
from agentmem.training.contexts import ARMS

results: Any = import_module("benchmarks.results")
shapes: Any = import_module("benchmarks.memory_shapes")
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


def test_the_table_of_all_tasks_has_each_arm_and_its_tokens(tmp_path: Path) -> None:
    def done(task: str, content: dict[str, Any]) -> None:
        (tmp_path / "smollm2" / task).mkdir(parents=True)
        (tmp_path / "smollm2" / task / "results.json").write_text(json.dumps(content), "utf-8")

    def row(share: float, tokens: float) -> dict[str, float]:
        return {"share": share, "questions": 20, "prompt_tokens": tokens}

    done("sgd", {"tasks": [{"arms": {"memory": row(0.25, 41), "zero": row(0, 41), "whole": row(0.1, 1252)}}]})
    cells = {"known-1": row(0.9, 30), "word-1": row(0.5, 50), "never-told": row(0.1, 90)}
    done("facts", {"cells": [{"cell": name, "arms": {"memory": each}} for name, each in cells.items()]})
    done("leak", {"memories": []})
    lines = results.overview("smollm2", tmp_path).splitlines()
    assert lines[0].startswith("| task | questions | memory | empty memory |")
    assert lines[2:] == [
        "| facts | 40 | 0.70 (40) |  |  |  |  |  |",
        "| sgd | 20 | 0.25 (41) | 0.00 (41) |  |  |  | 0.10 (1,252) |",
    ]
    page = tmp_path / "README.md"
    page.write_text("\n".join(["# Nothing", *marks("results"), *marks("tasks"), "The end.\n"]), "utf-8")
    put_into(page, "a table", "tasks")
    begin, end = marks("tasks")
    assert page.read_text("utf-8").endswith(f"{begin}\na table\n{end}\nThe end.\n")


def test_what_cannot_be_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["pico"], "models are nano, smollm2; found pico"),
        (["nano", "--only", "sgd"], "no step of nano is called sgd"),
        (["smollm2", "--only", "sgd"], "name it (--data-dir)"),
    ):
        with pytest.raises(SystemExit):
            results.main(arguments)
        assert message in capsys.readouterr().err


def test_every_memory_that_is_compared_is_one_that_can_be_trained() -> None:
    recipe = from_options(shapes.ROOT / "recipes" / "smollm2-135m.yaml", {})
    for shape in shapes.SHAPES:
        words = shapes.training(shape, Path("out"), steps=150, dtype="float32")
        memory = dict(words[n + 1].split("=", 1) for n, word in enumerate(words) if word == "--memory")
        given = {"memory": [f"{name}={value}" for name, value in memory.items()]}
        config = from_options(shapes.ROOT / "recipes" / "smollm2-135m.yaml", given)
        assert {**recipe.memory, **shapes.SHAPES[shape]} == config.memory
        MemoryConfig(**config.memory)
    assert set(shapes.CELLS) <= set(CELLS)


def test_the_page_of_memories_has_a_row_for_each(tmp_path: Path) -> None:
    page = tmp_path / "memory_shapes.md"
    page.write_text(f"# Shapes\n\n{BEGIN}\n{END}\n", "utf-8")
    adapter = tmp_path / "out" / "token-2x8" / "adapter"
    (adapter.parent / "facts").mkdir(parents=True)
    adapter.mkdir()
    (adapter / "delta_mem_config.json").write_text('{"target_layers": [1, 2], "num_state_heads": 2, "rank": 8}')
    (adapter / "adapter.safetensors").write_bytes(bytes(200_000))
    lines = [{"step": 1, "loss": 2.0}, *({"step": n, "arms": {"memory": n / 200}} for n in (75, 150))]
    (adapter / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    share = {"memory": {"share": 0.5, "low": 0.4, "high": 0.6}, "foreign": {"share": 0.02}}
    rows = [{"cell": cell, "arms": share} for cell in shapes.CELLS]
    (adapter.parent / "facts" / "results.json").write_text(json.dumps({"cells": rows}))
    shapes.write_page(tmp_path / "out", page)
    row = next(line for line in page.read_text("utf-8").splitlines() if "token-2x8" in line)
    assert row.startswith("| `token-2x8` | 256 | 0.2 | 0.38 | 0.75 | 0.50 (0.40-0.60) |")
    assert row.endswith("| 0.02 |")
    assert page.read_text("utf-8").count("not run yet") == len(shapes.SHAPES) - 1
