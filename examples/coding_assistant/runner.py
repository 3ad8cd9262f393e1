"""Runs a repository's tests: in a process of its own, in the repository's folder, for a limited time, without a shell.

A command is a target of the repository's Makefile ("make test"), or a test runner of Python and a few options
("unittest", "python -m pytest -q"). Anything else is refused before a process starts. Makefile and tests are the
repository's code, which only changes that a human approved.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from langchain_core.tools import ToolException

RUNNERS = ("unittest", "pytest")
OPTIONS = {"-q", "-v", "-x", "-f", "-b", "discover"}
_TARGET = re.compile(r"[a-z][a-z0-9_-]*")
_TAIL = 2_000


def words_of(command: str) -> list[str]:
    """What is run, word by word.

    Raises:
        ToolException: not a runner that is known and installed, or an option that is not allowed.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        raise ToolException(f"Error: {command!r} is no command.") from None
    if words[:1] == ["make"] and (make := shutil.which("make")):
        if len(words) != 2 or not _TARGET.fullmatch(words[1]):
            raise ToolException("Error: make takes the name of one target.")
        return [make, "-s", words[1], f"PYTHON={sys.executable}"]
    if words[:2] in (["python", "-m"], ["python3", "-m"]):
        words = words[2:]
    if not words or words[0] not in RUNNERS or find_spec(words[0]) is None:
        raise ToolException(f"Error: the runner {' '.join(words[:1])} is not known.")
    if refused := [word for word in words[1:] if word not in OPTIONS]:
        raise ToolException(f"Error: the option {refused[0]} is not allowed.")
    return [sys.executable, "-m", *words]


def run(command: str, folder: Path, *, seconds: float = 30.0, detail: int = 0) -> str:
    """One line about how the tests went and, where `detail` is more than 0, so many characters of the output's end.

    Raises:
        ToolException: see `words_of`; or the tests took too long, and were ended with all that they had started.
    """
    words = words_of(command)
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ToolException(f"Error: the tests took more than {seconds:g} seconds.") from None
        finally:
            _end(process)
        end = output.seek(0, os.SEEK_END)
        output.seek(max(0, end - _TAIL))
        said = output.read().decode("utf-8", "replace")
    outcome = _outcome(said, code)
    return f"{outcome}\n{said[-detail:]}" if detail else outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything in its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(said: str, code: int) -> str:
    """ "5 passed." or "Error: 1 of 5 tests failed.", from what unittest or pytest prints last."""
    ran = re.search(r"^Ran (\d+) tests?", said, re.MULTILINE)
    if ran:
        failed = sum(map(int, re.findall(r"(?:failures|errors)=(\d+)", said.rsplit("Ran ", 1)[-1])))
        total = int(ran[1])
    else:
        failed = sum(int(n) for n, _ in re.findall(r"(\d+) (failed|error)", said))
        total = failed + sum(map(int, re.findall(r"(\d+) passed", said)))
    if not total:
        return "Error: no test was found."
    return f"{total} passed." if code == 0 and not failed else f"Error: {failed} of {total} tests failed."
