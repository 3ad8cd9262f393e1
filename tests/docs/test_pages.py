"""README.md and the pages in docs do what they say: Python blocks run, commands exist, links lead somewhere.

A page's ```python blocks run in order in one namespace, in an empty folder, offline, warnings as errors. A block
marked ```python no-run needs what a test has not (a GPU, a server, a download) and is only compiled. In
```console, ```bash and ```sh blocks every `make` target, `agentmem` command and long option must exist.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from types import CodeType, ModuleType

import pytest

from agentmem_cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

_FENCE = re.compile(r"^```(?P<info>[^`\n]*)\n(?P<body>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: the words after the fence, the text, and the line of the page where the text starts."""

    info: tuple[str, ...]
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    return [
        Block(tuple(found["info"].split()), found["body"], text.count("\n", 0, found.start("body")) + 1)
        for found in _FENCE.finditer(text)
    ]


def python_blocks(page: Path) -> list[tuple[CodeType, bool]]:
    """The page's compiled blocks, and for each whether it is to be run."""
    found = []
    for block in blocks(page.read_text()):
        if not block.info or block.info[0] != "python":
            continue
        assert block.info[1:] in {(), ("no-run",)}, f"{page.name}:{block.line}: unknown mark {block.info[1:]}"
        # Blank lines before the code make tracebacks name the page's own lines.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
        found.append((code, len(block.info) == 1))
    return found


def command_lines(text: str) -> Iterator[list[str]]:
    """Commands of the shell blocks as words; of a console block only the lines that begin with "$"."""
    for block in blocks(text):
        if not block.info or block.info[0] not in {"console", "bash", "sh"}:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            prompt, _, rest = line.strip().partition(" ")
            if block.info[0] == "console" and prompt != "$":
                continue
            for part in re.split(r"&&|\|\||;|\|", rest if prompt == "$" else line):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def agentmem_help(command: tuple[str, ...]) -> tuple[int | str | None, str]:
    """Exit code and output of `agentmem COMMAND --help`; an unknown command exits with 2."""
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.setattr(sys, "argv", ["agentmem", *command, "--help"])
        # Wide and plain, so that no option is cut or split by colour codes.
        for name, value in {"COLUMNS": "240", "NO_COLOR": "1", "TERM": "dumb"}.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code, printed.getvalue()


def anchors(text: str) -> set[str]:
    """The heading anchors of a page, as GitHub names them."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in _HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A real module, since dataclasses and type hints look their module up by name.
    module = ModuleType("page_" + page.stem)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for code, runs in python_blocks(page):
        if runs:
            exec(code, module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page: Path) -> None:
    wrong = []
    for words in command_lines(page.read_text()):
        if words[0] == "make":
            named = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            wrong += [f"make {target}" for target in named if target not in make_targets()]
        if words[0] == "agentmem":
            stop = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
            command = shlex.join(words[:stop])
            code, printed = agentmem_help(tuple(words[1:stop]))
            if code != 0:
                wrong.append(f"{command}: {printed.strip()}")
            options = sorted({word.partition("=")[0] for word in words if word.startswith("--")})
            wrong += [f"{command} {option}" for option in options if option not in printed]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text())
    broken = []
    for plain, image in _LINK.findall(text):
        path, _, anchor = (plain or image).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(plain or image)
    assert broken == []


def test_results_area_is_marked_once() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- results:begin -->") == 1
    assert text.count("<!-- results:end -->") == 1
    assert text.index("<!-- results:begin -->") < text.index("<!-- results:end -->")


PLACE = re.compile(r"`([\w/]+\.py)(?::([\w.]+))?`")


def places() -> set[tuple[str, str]]:
    """Path and name of every place on the page; the name is empty where only the file is meant."""
    return set(PLACE.findall((ROOT / "ARCHITECTURE.md").read_text("utf-8")))


def source(path: str) -> Path:
    """The file of a path as the page writes it."""
    if path.startswith("tests/"):
        return ROOT / path
    return ROOT / ("integrations" if path.startswith("agentmem_") else "agentmem") / path


def names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Functions and classes that a file defines, methods as `Class.method`."""
    defined: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            defined.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                defined |= names(node.body, f"{node.name}.")
    return defined


def missing() -> set[str]:
    absent = set()
    for path, name in places():
        file = source(path)
        if file.exists() and (not name or name in names(ast.parse(file.read_text("utf-8")).body)):
            continue
        absent.add(f"{path}:{name}" if name else path)
    return absent


def test_every_place_exists() -> None:
    assert len(places()) > 30
    assert missing() == set()


def test_every_part_of_the_engine_stands_in_the_table() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    parts = {path.name for path in (ROOT / "agentmem").iterdir() if path.name[0] != "_" and path.name != "py.typed"}
    assert {part for part in parts if f"`{part}" not in page} == set()


PAGE, RUN = ROOT / "docs" / "moving.md", ROOT / "docs" / "results" / "chat_models.md"

_OWN = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_RAN = re.compile(r"`(test_\w+(?:\[\w+\])?)`")


def rows(text: str) -> Iterator[list[str]]:
    """The cells of all tables, without heads and rules."""
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def features() -> list[list[str]]:
    table = PAGE.read_text().partition("## Features, each with its test")[2]
    head, *found = rows(table)
    assert head[1:3] == ["ChatDeltaMem", "ChatHuggingFace (pipeline)"]
    return found


def verdicts(column: int) -> dict[str, set[str]]:
    """What each test of the run ended as, by its id and by its name, which may stand for several ids."""
    found: dict[str, set[str]] = {}
    for cells in rows(RUN.read_text()):
        if cells[0].startswith("`test_"):
            test = cells[0].strip("`")
            for name in {test, test.partition("[")[0]}:
                found.setdefault(name, set()).add(cells[column].partition(":")[0])
    return found


def test_every_feature_of_ours_names_a_test_that_exists() -> None:
    missing = []
    for name, ours, *_ in features():
        assert _OWN.search(ours) or _RAN.search(ours), f"{name}: no test"
        for file, function in _OWN.findall(ours):
            path = ROOT / file
            if not (path.exists() and re.search(rf"^(async )?def {function}\(", path.read_text(), re.MULTILINE)):
                missing.append(f"{file}::{function}")
    assert missing == []


@pytest.mark.parametrize("column", [1, 2], ids=["ChatDeltaMem", "ChatHuggingFace"])
def test_what_was_run_ended_as_the_table_tells(column: int) -> None:
    ended, wrong = verdicts(column), []
    for name, *cells in features():
        said = re.match(r"(yes|no)\b", cells[column - 1])
        # What stands in brackets is said about another test than the one that decides.
        for test in _RAN.findall(cells[column - 1].partition(" (`")[0]):
            asked = {"passed"} if said is None or said[1] == "yes" else {"failed"}
            if ended.get(test) != asked:
                wrong.append(f"{name}: {test} ended as {ended.get(test)}")
    assert wrong == []
