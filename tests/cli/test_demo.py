"""The demo keeps its promise, and says so with its exit code where it does not."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import agentmem
from agentmem.nano.recipe.language import named_values
from agentmem_cli.app import app
from agentmem_cli.script import draw_script, is_right

NANO = Path(agentmem.__file__).parent / "nano" / "weights"


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["demo", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.fixture
def phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a program in the place of the two processes: it ends with a code, or leaves made-up scores."""

    def install(memory: int = 8, zeroed: int = 0, foreign: int = 0, fails: str = "") -> None:
        arms = {"memory": memory, "zeroed": zeroed, "foreign": foreign}
        report = {
            "arms": {arm: {"right": n, "questions": 8} for arm, n in arms.items()},
            "cites": True,
            "rewound": True,
        }
        code, program = tmp_path / "phases.py", tmp_path / "phases"
        # A shell in front: an interpreter whose path has a space cannot stand in a script's first line.
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(code))} "$@"\n')
        code.write_text(
            f"import json, pathlib, sys\nphase, setup = sys.argv[-2:]\n"
            f"if phase == {fails!r}: sys.exit(7)\n"
            f"scores = pathlib.Path(json.loads(setup)['data'], 'scores.json')\n"
            f"if phase == 'ask': scores.write_text({json.dumps(report)!r})\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return install


@pytest.mark.parametrize(
    ("scores", "code", "short"),
    [
        ({}, 0, 0),
        ({"memory": 7, "zeroed": 2, "foreign": 2}, 0, 0),
        ({"memory": 6}, 1, 1),
        ({"zeroed": 3}, 1, 1),
        ({"foreign": 3}, 1, 1),
        ({"memory": 0, "zeroed": 8, "foreign": 8}, 1, 3),
        ({"fails": "tell"}, 7, 0),
        ({"fails": "ask"}, 7, 0),
    ],
)
def test_exit_code(phases: Callable[..., None], tmp_path: Path, scores: dict[str, Any], code: int, short: int) -> None:
    phases(**scores)
    ended, shown = run("--data", tmp_path / "data")
    assert ended == code
    assert shown.count("falls short") == short
    started = re.findall(r"process (\d+) started", shown)
    assert len(set(started)) == (1 if scores.get("fails") == "tell" else 2)
    assert re.findall(r"process (\d+) ended", shown) == started
    assert str(os.getpid()) not in started


def test_the_last_line_is_a_command_that_the_user_can_run(
    phases: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases()
    program = Path(sys.executable).parent / "bin" / "agentmem"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bin/agentmem", "demo"])

    def last_line(*options: str) -> list[str]:
        return shlex.split(run("--data", "my data", *options)[1].splitlines()[-1])

    chat = ["chat", "--db", "my data/threads.db", "--thread", "demo", "--window", "1m"]
    assert last_line("--dtype", "bfloat16") == ["bin/agentmem", *chat, "--dtype", "bfloat16"]
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(sys, "argv", [str(program), "demo"])
    assert last_line() == ["agentmem", *chat]


def test_every_run_starts_from_nothing(phases: Callable[..., None], tmp_path: Path) -> None:
    phases()
    data = tmp_path / "data"
    run("--data", data)
    (data / "facts").mkdir()
    (data / "facts" / "old").touch()
    assert run("--data", data)[0] == 0
    assert not (data / "facts").exists()


def test_nothing_of_the_user_is_deleted(phases: Callable[..., None], tmp_path: Path) -> None:
    phases()
    (tmp_path / "thesis.txt").write_text("mine")
    done = CliRunner().invoke(app, ["demo", "--data", str(tmp_path)])
    assert isinstance(done.exception, agentmem.errors.ConfigError)
    assert "--data" in str(done.exception)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_script_follows_from_its_seed() -> None:
    assert draw_script(3) == draw_script(3)
    assert len({draw_script(seed).said for seed in range(40)}) == 40


@pytest.mark.parametrize("seed", range(40))
def test_script(seed: int) -> None:
    script = draw_script(seed)
    held = [binding for _, binding in script.questions]
    assert len(held) >= 8
    assert len({b.attribute for b in held}) == len(held)
    # One fact is told, then changed.
    assert script.new in held
    assert script.old.attribute == script.new.attribute
    assert script.old.value != script.new.value
    before = script.said[: script.said.index(script.change)]
    assert any(script.old.value in named_values(text, script.old.attribute) for text in before)
    # What holds at the end was said, and no question says it.
    for question, binding in script.questions:
        assert any(binding.value in named_values(text, binding.attribute) for text in script.said)
        assert not named_values(question, binding.attribute)
    # The other thread is told the same things with values that the thread never had.
    for binding in [*held, script.old]:
        assert script.elsewhere[binding.attribute].value != binding.value
    # The store can not answer the questions.
    for sourced in script.facts:
        assert not any(b.value in named_values(sourced.fact.sentence, b.attribute) for b in held)
        assert not any(sourced.fact.subject in question for question, _ in script.questions)
    assert script.asked_fact in script.facts
    assert script.asked_fact.fact.subject in script.fact_question


@pytest.mark.parametrize("seed", range(40))
def test_script_in_english(seed: int) -> None:
    script = draw_script(seed, "smollm2")
    held = [binding for _, binding in script.questions]
    assert script == draw_script(seed, "smollm2")
    assert len({b.attribute for b in held}) == len(held) == 4
    assert script.new in held
    assert script.old.attribute == script.new.attribute
    before = script.said[: script.said.index(script.change)]
    assert any(is_right(text, script.old) for text in before)
    assert is_right(script.change, script.new)
    for question, binding in script.questions:
        assert any(is_right(text, binding) for text in script.said)
        assert not is_right(question, binding)
    for binding, text in zip(script.elsewhere.values(), script.other, strict=True):
        assert is_right(text, binding)
    for binding in [*held, script.old]:
        assert script.elsewhere[binding.attribute].value != binding.value


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_with_another_model_ends_with_its_scores(tiny_model: Path, tmp_path: Path) -> None:
    """A random model knows nothing, and the demo says so."""
    options = ["demo", "--model", str(tiny_model), "--data", str(tmp_path / "data")]
    done = subprocess.run(
        [sys.executable, "-c", "from agentmem_cli import main; main()", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "data" / "scores.json").read_text())
    assert {arm["questions"] for arm in report["arms"].values()} == {4}
    assert "falls short: the thread's memory" in done.stdout


@pytest.mark.timeout(900)
def test_demo_with_nano(tmp_path: Path, needs: Callable[[object, str], None]) -> None:
    """The main job: learned in one process, known in another, and only with the thread's own memory."""
    needs((NANO / "adapter").is_dir(), "the embedded model's weights (agentmem nano build)")
    done = subprocess.run(
        [sys.executable, "-c", "from agentmem_cli import main; main()", "demo", "--data", str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "data" / "scores.json").read_text())
    assert report["arms"]["memory"]["right"] >= report["arms"]["memory"]["questions"] - 1
    assert report["cites"]
    assert report["rewound"]
    assert done.stderr == ""
