"""LangChain's standard integration suite with nano, for ChatDeltaMem and for ChatHuggingFace on the same weights.

    python benchmarks/chat_models.py                                       the table (a minute or two)
    python benchmarks/chat_models.py --page docs/results/chat_models.md    the same as a page

A few tests beside the suite follow (stop strings, batches, methods of structured output). Each model runs in a process
of its own, with every flag on that tests/langgraph/test_standard_suites.py switches on, greedily, on one thread,
without a network. ChatHuggingFace needs langchain-huggingface; where it cannot be imported its column is left out, and
a line says so. To try it without installing it into the project:

    pip install --no-deps --target /tmp/hf langchain-huggingface
    PYTHONPATH=/tmp/hf python benchmarks/chat_models.py

The suite tests plumbing, but some of its tests also ask for skill (which tool to call, with which words). nano has
little, and both have the same: where the model lacks skill both fail. The exit code is 1 where a suite could not be
run; a failed test changes nothing about it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from agentmem.loading import NANO

MODELS = ("ChatDeltaMem", "ChatHuggingFace")
SUITES = Path(__file__).parent / "chat_model_suites.py"
LIBRARIES = ("agentmem-delta", "langchain-core", "langchain-tests", "langchain-huggingface", "transformers", "torch")
LONGEST = 120  # characters of an error on the page
SETTINGS = """[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
timeout = 600
python_files = *.py
addopts = -p no:benchmark -p no:codspeed -p no:recording -p no:cacheprovider
    --disable-socket --allow-unix-socket --allow-hosts=127.0.0.1,::1,localhost
"""
INTRODUCTION = """\
`ChatModelIntegrationTests` of langchain-tests on the weights of nano, with the same flags for each: tool calling, tool
choice, structured output, JSON mode, usage metadata with cache reads. The suite tests
plumbing; some of its tests also ask for skill, of which nano has little. Where the model lacks skill both fail. What is
skipped is what a text model has not (images, audio, PDF), another model named in a call, and recorded traffic."""

Verdict = Literal["passed", "failed", "skipped"]
VERDICTS: tuple[Verdict, ...] = ("passed", "failed", "skipped")


@dataclass(frozen=True)
class Outcome:
    """What became of one test: the verdict, and the first line of the error or of the reason to skip."""

    verdict: Verdict
    said: str = ""
    own: bool = False  # a test beside the suite

    def __str__(self) -> str:
        return f"{self.verdict}: {self.said}" if self.said else self.verdict


def first_line(message: str) -> str:
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def outcome(case: ElementTree.Element) -> Outcome:
    own = case.get("classname", "").endswith("Beside")
    for tag in ("failure", "error"):
        if (found := case.find(tag)) is not None:
            return Outcome("failed", first_line(found.get("message") or found.text or ""), own)
    if (found := case.find("skipped")) is not None:
        return Outcome("skipped", first_line(found.get("message") or ""), own)
    return Outcome("passed", "", own)


def run(model: str) -> dict[str, Outcome]:
    """The suite for one model, in a process of its own.

    Raises:
        RuntimeError: no test was run.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings, report = Path(folder) / "pytest.ini", Path(folder) / "report.xml"
        settings.write_text(SETTINGS)
        tests = [f"{SUITES}::Test{model}", f"{SUITES}::Test{model}Beside"]
        command = [sys.executable, "-m", "pytest", "-q", "-c", str(settings), "--rootdir", str(SUITES.parent)]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "LANGSMITH_TRACING": "false"}
        done = subprocess.run(
            [*command, f"--junitxml={report}", *tests],
            env=os.environ | offline | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    found = {case.get("name", ""): outcome(case) for case in cases}
    if not any(name.startswith("test_") for name in found):
        raise RuntimeError(f"the suite could not be run for {model}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found


def counted(outcomes: Mapping[str, Outcome]) -> str:
    """How many of each verdict, of the suite and of what is beside it."""
    parts = []
    for own, where in ((False, "of the suite"), (True, "beside it")):
        verdicts = Counter(each.verdict for each in outcomes.values() if each.own is own)
        parts.append(", ".join(f"{verdicts[name]} {name}" for name in VERDICTS if verdicts[name]) + f" {where}")
    return "; ".join(parts)


def versions() -> str:
    known = []
    for name in LIBRARIES:
        try:
            known.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(known)


def rows(found: Mapping[str, Mapping[str, Outcome]], own: bool) -> list[tuple[str, ...]]:
    """Test id and the outcome of each model, in the order of the file; of the suite, or of the tests beside it."""
    names = dict.fromkeys(name for outcomes in found.values() for name, each in outcomes.items() if each.own is own)
    return [(name, *(str(outcomes.get(name, "not run")) for outcomes in found.values())) for name in names]


def as_page(found: Mapping[str, Mapping[str, Outcome]], notes: list[str], command: str) -> str:
    def cell(text: str) -> str:
        for letter in "\\|<>*_[]`":  # shown as they are
            text = text.replace(letter, f"\\{letter}")
        return text

    digest = hashlib.sha256((NANO / "model.safetensors").read_bytes()).hexdigest()[:12]
    table = [f"| test | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]

    def body(own: bool) -> list[str]:
        return [*table, *(f"| `{name}` | {' | '.join(map(cell, cells))} |" for name, *cells in rows(found, own))]

    lines = [
        "# Chat models, LangChain's standard suite",
        "",
        INTRODUCTION,
        "",
        f"- `{command}`, {datetime.now(UTC):%Y-%m-%d}",
        f"- Python {platform.python_version()}, {versions()}",
        f"- nano: `model.safetensors` with SHA-256 {digest}...",
        *(f"- {model}: {counted(outcomes)}" for model, outcomes in found.items()),
        *(f"- {note}" for note in notes),
        "",
        "## The suite",
        "",
        *body(own=False),
        "",
        "## Beside the suite",
        "",
        "Tests of `benchmarks/chat_model_suites.py` about what the suite does not look at.",
        "",
        *body(own=True),
    ]
    return "\n".join(lines) + "\n"


def main(page: Annotated[Path | None, typer.Option(help="Write a page here.")] = None) -> None:
    console = Console()
    found: dict[str, dict[str, Outcome]] = {}
    notes = []
    for model in MODELS:
        if model == "ChatHuggingFace" and find_spec("langchain_huggingface") is None:
            notes.append("ChatHuggingFace was not run: langchain_huggingface cannot be imported")
            continue
        console.print(f"{model} ...")
        try:
            found[model] = run(model)
        except RuntimeError as error:
            console.print(str(error), markup=False)
            raise typer.Exit(1) from error
    table = Table("test", *found)
    for row in (*rows(found, own=False), *rows(found, own=True)):
        table.add_row(*(text.replace("[", "\\[") for text in row))
    console.print(table)
    for model, outcomes in found.items():
        console.print(f"{model}: {counted(outcomes)}")
    for note in notes:
        console.print(note)
    if page is not None:
        command = f"python {' '.join(sys.argv)}"
        page.write_text(as_page(found, notes, command))
        console.print(f"written: {page}")


if __name__ == "__main__":
    typer.run(main)
