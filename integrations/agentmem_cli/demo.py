"""`agentmem demo`: an agent learns in one process and answers from its memory in another.

This process only starts the two others (`agentmem_cli.phases`), waits for each to end, and judges their report. It
loads no model, so nothing can pass from one to the other through it.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentmem.errors import ConfigError
from agentmem_cli.options import Loading
from agentmem_cli.scores import MISSES, NAMES, Report, Setup, read_scores, shortfalls
from agentmem_cli.terminal import command

_MARKER = ".agentmem-demo"


def demo(loading: Loading, seed: int, data: Path) -> int:
    """Run the demo. Returns the exit code: 1 if an arm misses its bar, otherwise that of a process that failed.

    Raises:
        ConfigError: `data` holds something that was not made by a demo.
    """
    console = Console()
    started = time.monotonic()
    prepare(data)
    setup = Setup(seed, loading, str(data))
    console.print(
        Text.assemble(
            ("agentmem demo", "bold"),
            f"  model {loading.model}, seed {seed} (every name and value below is drawn from it; --seed draws others)",
        )
    )
    for phase, title in (("tell", "1  A process is told things"), ("ask", "2  Another process answers from memory")):
        console.rule(f"[bold]{title}", align="left")
        if code := _run(phase, setup, console):
            return code
    report = read_scores(setup)
    missed = shortfalls(report.arms)
    console.rule("[bold]Result", align="left")
    console.print(_verdict(report))
    for line in missed:
        console.print(Text.assemble(("falls short: ", "bold red"), line))
    if not missed:
        console.print(Text("The agent knew what it was told, and only with its own memory.", style="bold green"))
    console.print(f"{time.monotonic() - started:.0f} s. Go on with this thread yourself:", highlight=False)
    console.print(Text(f"  {_chat(setup)}"), soft_wrap=True)
    return 1 if missed else 0


def prepare(data: Path) -> None:
    """Make the directory, empty. Files of an earlier demo are deleted; anything else is left, and refused.

    Raises:
        ConfigError: it is not empty, and was not made by a demo.
    """
    if data.exists() and (not data.is_dir() or (any(data.iterdir()) and not (data / _MARKER).exists())):
        raise ConfigError(
            "the demo empties its directory; expected a new or empty one, or an earlier demo's; "
            f"found {data} with other content; give another with --data"
        )
    if data.exists():
        shutil.rmtree(data)
    data.mkdir(parents=True)
    (data / _MARKER).touch()


def _run(phase: str, setup: Setup, console: Console) -> int:
    """Run one phase in a separate process; returns its exit code when it has ended."""
    program = [sys.executable, "-m", "agentmem_cli.phases", phase, setup.to_json()]
    with subprocess.Popen(program) as child:
        console.print(Text.assemble((f"process {child.pid}", "bold"), " started"))
        code = child.wait()
    left = "" if code else f". Its context, its model and its caches are gone; what is left is in {setup.data}"
    console.print(Text.assemble((f"process {child.pid}", "bold"), f" ended with exit code {code}{left}"))
    return code


def _verdict(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    for arm, name in NAMES.items():
        allowed = f"may miss {MISSES}" if arm == "memory" else f"may hit {report.arms[arm].by_chance} by chance"
        table.add_row(name, f"{report.arms[arm]} right", Text(allowed, style="dim"))
    table.add_row("exact fact with its citation", _word(report.cites))
    table.add_row("rewound to before the change", _word(report.rewound))
    return table


def _word(right: bool) -> Text:
    return Text("right", style="green") if right else Text("wrong", style="red")


def _chat(setup: Setup) -> str:
    threads = shlex.quote(str(setup.threads))
    return f"{command()} chat --db {threads} --thread demo --window 1m{setup.loading.arguments()}"
