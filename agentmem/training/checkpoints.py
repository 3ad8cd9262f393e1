"""The directory of a run: checkpoints, the best adapters, and the log.

A directory is written under another name and renamed when it is complete, and it loses its name before it is removed.
So whatever has a name that counts is whole, at whatever moment a run was killed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentmem.text import parse_json

LOG_FILE = "log.jsonl"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_BEST = re.compile(r"best-(\d+)")


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run with their steps, oldest first. All are whole."""
    return _numbered(out, _CHECKPOINT)


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = checkpoints(out)
    return found[-1][1] if found else None


def best_adapters(out: Path) -> list[tuple[int, Path]]:
    """The adapters that were the best when they were measured, with their steps, oldest first."""
    return _numbered(out, _BEST)


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """A directory to write into, which takes its name, and replaces what has it, when all is written."""
    aside = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    remove(directory)
    os.replace(aside, directory)


def logged(path: Path) -> tuple[list[float], float]:
    """The loss of every step of a run that is finished, and its seconds in all sittings."""
    lines = [parse_json(line) for line in path.read_text("utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line], lines[-1]["seconds"] if lines else 0.0


def cut_log(path: Path, step: int) -> float:
    """Drop the lines of a log after a step, and one that was not written to its end; the seconds until that step."""
    if not path.exists():
        return 0.0
    kept, seconds = [], 0.0
    for line in path.read_text("utf-8").splitlines():
        try:
            values = parse_json(line)
        except ValueError:
            break
        if values["step"] > step:
            break
        kept.append(line)
        seconds = values["seconds"]
    aside = path.with_suffix(".partial")
    aside.write_text("".join(line + "\n" for line in kept), "utf-8")
    os.replace(aside, path)
    return seconds


def _numbered(out: Path, name: re.Pattern[str]) -> list[tuple[int, Path]]:
    found = []
    for path in out.iterdir() if out.is_dir() else ():
        match = name.fullmatch(path.name)
        if match is not None and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def remove(directory: Path) -> None:
    """Remove a directory so that no half of it is ever there under its name."""
    if directory.exists():
        aside = directory.with_name(f".{directory.name}.removed")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(directory, aside)
        shutil.rmtree(aside)
