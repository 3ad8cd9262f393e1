"""The commands of the first screen: what `make` would run, without running it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import agentmem

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run make as if by hand: not as a part of the make that may be running the tests."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh checkout, as far as make sees it, under a path with a space."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def planned(folder: Path, *target: str) -> str:
    done = make("--dry-run", *target, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_alone_lists_the_targets() -> None:
    done = make()
    assert done.returncode == 0
    for target in ("demo", "test", "lint"):
        assert re.search(rf"^make {target}\s+\S", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_targets_set_up_their_environment_from_wheels_and_pins(checkout: Path, target: str) -> None:
    (install,) = (line for line in planned(checkout, target).splitlines() if "'.[all]'" in line)
    assert "--only-binary=:all: -c constraints.txt -e '.[all]'" in install
    assert ("--group dev" in install) == (target != "demo")


def test_a_gpu_is_asked_from_an_environment_that_can_train(checkout: Path) -> None:
    commands = planned(checkout, "gpu", "ARGS=--minutes 15")
    assert "-e '.[all]' -e '.[train]'" in commands
    assert ".venv/bin/python -m benchmarks.gpu --minutes 15" in commands


def test_the_newest_versions_are_tried_in_an_environment_of_their_own(checkout: Path) -> None:
    commands = planned(checkout, "test-newest")
    (install,) = (line for line in commands.splitlines() if "'.[all]'" in line)
    assert install.startswith(".venv-newest/bin/python -m pip install")
    assert "-c .venv-newest/constraints.txt" in install
    assert "--upgrade-strategy eager" in install
    assert ".venv/" not in commands.replace(".venv-newest/", "")


def test_an_environment_that_is_up_to_date_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    for stamp in (".installed", ".installed-dev"):
        (checkout / ".venv" / stamp).touch()
    for target in ("demo", "test", "lint"):
        assert "pip install" not in planned(checkout, target)
    later = (checkout / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    for target in ("demo", "test", "lint"):
        assert "pip install" in planned(checkout, target)


def test_an_old_python_is_refused_before_anything_is_installed(checkout: Path) -> None:
    done = make("demo", "PYTHON=false", folder=checkout)
    assert done.returncode != 0
    assert "agentmem needs Python 3.11 or newer" in done.stderr
    assert not (checkout / ".venv").exists()


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert re.search(r"^make test\b", script.read_text(), re.MULTILINE)


def test_changelog_and_pins_follow_the_project() -> None:
    assert f"## [{agentmem.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==\d", pins, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name = re.split(r"[\[<>=]", requirement)[0]
        assert f"\n{name}==" in pins, f"{name} should be pinned in constraints.txt"


@pytest.mark.parametrize("target", ["test-numeric", "test-numeric QUICK=1"])
def test_the_files_that_a_target_names_exist(target: str) -> None:
    named = set(re.findall(r"\btests/[\w/]+\.py", planned(ROOT, *target.split())))
    assert len(named) > 5
    assert {name for name in named if not (ROOT / name).exists()} == set()
