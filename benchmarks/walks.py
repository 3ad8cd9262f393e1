"""How far one call travels: files entered, functions entered, and changes from one file to another.

    python benchmarks/walks.py                       the table and the bars (half a minute)
    python benchmarks/walks.py --check               the same; the exit code is 1 where a bar is missed
    python benchmarks/walks.py --list "put, SQLite"  the files of one walk, in the order in which they are entered
    python benchmarks/walks.py --all-packages langchain_core,langgraph
                                                     these packages' files count as well

A walk is what `sys.setprofile` reports of a warm call. A file is entered when a Python function of it starts or a
generator of it goes on, in whichever thread. A change is counted when the next function entered lies in another file
than the last one in its thread; coming back is not counted. Only files of this repository count (`agentmem` and
`integrations`); a row of one of LangGraph's own savers counts the package of that saver and
`langgraph.checkpoint.base` in their place.

Calls of a saver are those of turns 6 to 15 of a chat graph (see `checkpointer_runs.py`), three checkpoints each. The
table shows the most files of any call, and functions and changes of the call in the middle, with the least and the
most changes in brackets. A turn is `ChatDeltaMem.invoke` of the embedded model on a CPU, at most 12 tokens, the second
of its thread. PostgreSQL is left out where no server answers.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FrameType
from typing import Annotated, Any

import grimp
import typer
from checkpointer_runs import chat_graph, take_turn
from checkpointer_savers import ALONE, MARIADB, POSTGRES, Contender, Servers, answering, opened
from checkpointers import POSTGRES_URL
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
OWN = (ROOT / "agentmem", ROOT / "integrations")
PACKAGES = (
    "agentmem",
    "agentmem_langgraph",
    "agentmem_sql",
    "agentmem_chroma",
    "agentmem_governance",
    "agentmem_serve",
    "agentmem_cli",
)
PEERS = {
    "SqliteSaver": ("langgraph.checkpoint.sqlite", "langgraph.checkpoint.base"),
    "PostgresSaver": ("langgraph.checkpoint.postgres", "langgraph.checkpoint.base"),
}
TURNS = range(5, 15)  # of a chat graph that are counted; the ones before them warm up
TOKENS = 12

# The most that is allowed: files entered and changes of file; files and lines of a package; circles of files.
CHECKPOINT_BAR = (11, 30)
TURN_BAR = (22, 250)
SQL_BAR = (26, 5_800)
CIRCLES_BAR = 0


@dataclass
class Walk:
    """What was entered, in order."""

    files: dict[str, None] = field(default_factory=dict)
    functions: set[CodeType] = field(default_factory=set)
    changes: int = 0


class Walker:
    """Follows calls in every thread that starts after it was made; counts while a walk is set.

    A thread that runs already (a worker of an engine) is followed only if it was started afterwards, so make this
    first.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = tuple(f"{root}/" for root in roots)
        self._walk: Walk | None = None
        self._last = threading.local()
        self._counts: dict[CodeType, bool] = {}
        threading.setprofile(self._follow)
        sys.setprofile(self._follow)

    def close(self) -> None:
        """Stop following; threads that run already keep a hook that does nothing."""
        self._walk = None
        threading.setprofile(None)
        sys.setprofile(None)

    @contextmanager
    def walk(self) -> Iterator[Walk]:
        """Count what is entered inside."""
        self._last = threading.local()
        walk = self._walk = Walk()
        try:
            yield walk
        finally:
            self._walk = None

    def _follow(self, frame: FrameType, event: str, _argument: object) -> None:
        walk = self._walk
        if walk is None or event != "call":
            return
        code = frame.f_code
        counts = self._counts.get(code)
        if counts is None:
            counts = self._counts[code] = code.co_filename.startswith(self.roots)
        if not counts:
            return
        file = code.co_filename
        walk.functions.add(code)
        walk.files[file] = None
        if getattr(self._last, "file", file) != file:
            walk.changes += 1
        self._last.file = file


def package_folders(names: Sequence[str]) -> list[Path]:
    """Where packages lie; a name that is a namespace package has several folders."""
    folders: list[Path] = []
    for name in names:
        spec = find_spec(name)
        if spec is None:
            raise typer.BadParameter(f"no package {name!r} is installed")
        folders += [Path(place) for place in spec.submodule_search_locations or [spec.origin or ""]]
    return folders


def saver_walks(contender: Contender, servers: Servers, more: Sequence[Path]) -> Iterator[tuple[str, list[Walk]]]:
    """`put` and `get_tuple` of a saver in the last turn of a thread."""
    roots = [*(OWN if contender.ours else package_folders(PEERS[contender.saver])), *more]
    with servers.database(contender.database) as url, opened(contender, url) as saver:
        walker = Walker(roots)
        walks: dict[str, list[Walk]] = defaultdict(list)

        def followed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def follow(*args: Any, **kwargs: Any) -> Any:
                with walker.walk() as walk:
                    result = call(*args, **kwargs)
                walks[name].append(walk)
                return result

            return follow

        try:
            graph = chat_graph(saver)
            for number in range(TURNS.start):
                take_turn(graph, "thread", number, "walk")
            for name in ("put", "get_tuple"):
                setattr(saver, name, followed(name, getattr(saver, name)))
            for number in TURNS:
                take_turn(graph, "thread", number, "walk")
        finally:
            walker.close()
    for name in ("put", "get_tuple"):
        yield name, sorted(walks[name], key=lambda walk: walk.changes)


def turn_walk(more: Sequence[Path]) -> Walk:
    """One turn of the chat model on the embedded model, on a CPU."""
    walker = Walker([*OWN, *more])
    try:
        from langchain_core.messages import HumanMessage

        import agentmem
        from agentmem_langgraph import ChatDeltaMem, MemoryTurn

        with agentmem.load("nano", device="cpu") as engine:
            llm = ChatDeltaMem(engine=engine, temperature=0.0, max_tokens=TOKENS)
            messages: list[Any] = [HumanMessage("My editor is helix.")]
            turn = MemoryTurn(None)
            messages += [llm.invoke(messages, memory=turn), HumanMessage("What is my editor?")]
            turn = MemoryTurn(turn.state)
            with walker.walk() as walk:
                llm.invoke(messages, memory=turn)
        return walk
    finally:
        walker.close()


def circles() -> list[list[str]]:
    """Circles of files, imports under TYPE_CHECKING and inside functions included; each as the sorted files of it."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False, cache_dir=None)
    reached = {module: graph.find_upstream_modules(module) for module in graph.modules}
    groups = {
        tuple(sorted({module, *(other for other in reached[module] if module in reached[other])}))
        for module in graph.modules
    }
    return [list(group) for group in sorted(groups) if len(group) > 1]


def lines_of(folder: Path) -> tuple[int, int]:
    """Python files in a folder, and their lines."""
    files = list(folder.rglob("*.py"))
    return len(files), sum(len(file.read_text("utf-8").splitlines()) for file in files)


def mark(measured: Sequence[int], bar: Sequence[int] | None) -> str:
    """Whether a bar is held; empty where there is none."""
    return "" if bar is None else "yes" if all(a <= b for a, b in zip(measured, bar, strict=True)) else "NO"


def main(
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 where a bar is missed.")] = False,
    listed: Annotated[str, typer.Option("--list", help="Show the files of this walk.")] = "",
    all_packages: Annotated[str, typer.Option(help="Packages that count as well, separated by commas.")] = "",
    postgres: Annotated[str, typer.Option(help="A server where databases can be made; '' for none.")] = POSTGRES_URL,
) -> None:
    """Count how far a checkpoint and a turn travel, beside LangGraph's own savers."""
    more = package_folders([name for name in all_packages.split(",") if name])
    console = Console(width=None if sys.stdout.isatty() else 120)
    urls, left_out = answering({POSTGRES: postgres})
    for line in left_out:
        console.print(line, highlight=False, markup=False)
    table = Table("call", "files", "functions", "changes of file", "bar", "held")
    held: list[str] = []

    def add(name: str, walks: Sequence[Walk], bar: tuple[int, int] | None) -> None:
        walk = walks[len(walks) // 2]
        files = max(len(each.files) for each in walks)
        held.append(mark((files, walk.changes), bar))
        bounds = f" ({walks[0].changes} to {walks[-1].changes})" if walks[0].changes < walks[-1].changes else ""
        shown = "" if bar is None else f"{bar[0]} files, {bar[1]} changes"
        table.add_row(name, str(files), str(len(walk.functions)), f"{walk.changes}{bounds}", shown, held[-1])
        if listed == name:
            for file in walk.files:
                console.print(file.removeprefix(f"{ROOT}/"), highlight=False, markup=False)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        servers = Servers(Path(folder), urls)
        for contender in ALONE:
            if contender.database == MARIADB or not (contender.installed and servers.has(contender)):
                continue
            for call, walks in saver_walks(contender, servers, more):
                name = f"{call}, {contender.database}"
                if contender.ours:
                    add(name, walks, CHECKPOINT_BAR)
                else:
                    add(f"{name}: {contender.saver}", walks, None)
    add("ChatDeltaMem.invoke, CPU", [turn_walk(more)], TURN_BAR)
    console.print(table)

    sizes = Table("of the source", "measured", "bar", "held")
    files, lines = lines_of(ROOT / "integrations" / "agentmem_sql")
    held.append(mark((files, lines), SQL_BAR))
    sizes.add_row(
        "agentmem_sql", f"{files} files, {lines:,} lines", f"{SQL_BAR[0]} files, {SQL_BAR[1]:,} lines", held[-1]
    )
    rings = circles()
    held.append(mark((len(rings),), (CIRCLES_BAR,)))
    sizes.add_row("circles of files", str(len(rings)), str(CIRCLES_BAR), held[-1])
    console.print(sizes)
    for ring in rings:
        console.print("circle: " + ", ".join(ring), highlight=False, markup=False)
    raise typer.Exit(1 if check and "NO" in held else 0)


if __name__ == "__main__":
    typer.run(main)
