"""How fast the forms of the recurrence are on this CPU, and whether the chooser picks the right one.

    python benchmarks/scan.py                      the table, a picture, and the bars (exit code 1 if one is missed)
    python benchmarks/scan.py --grid               rows x length x rank: the ground for `block_length`'s thresholds
    AGENTMEM_TRITON=1 python benchmarks/scan.py    on a GPU: the Triton scan too, forward and with its gradients

One thread, and the time that thread spent computing: what other processes take does not count. Every cell's forms run
in turn, `--repeats` rounds, so that a machine that slows down slows all of them alike; a figure is the least time of
the rounds, a ratio the median over the rounds of one form's time by another's. On a GPU the clock on the wall counts,
until the device is done; no bar is for that.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conditions import command, hardware, picture, text, versions
from rich.console import Console
from rich.table import Table
from torch import Tensor

from agentmem import kernels
from agentmem.kernels.recurrence import ScanArgs, block_length, scan, scan_blocked, scan_loop, scan_reference

Form = Callable[..., tuple[Tensor, Tensor]]

RANKS = (8, 16, 32, 64)
LENGTHS = (1, 16, 32, 64, 96, 128, 256, 512, 2048, 8192)
CHUNKS = (8, 16, 32, 64)
# rank: blocked at least so many times as fast as (plain, tight loop), at 8,192 tokens, one row.
BARS = {8: (20.0, 6.0), 16: (10.0, 3.0), 32: (5.0, 2.0), 64: (3.0, 1.2)}
# rows x rank up to which the grid looks: beyond where blocks pay.
GRID_SIZE = 1_024
CPU = torch.device("cpu")
# Where the chooser takes blocks it must not be slower than the tight loop by more than the noise of the clock; where it
# takes the loop it is the loop.
NOISE = 0.05


@dataclass(frozen=True)
class Cell:
    """Times in seconds, a list of rounds for each form."""

    rows: int
    length: int
    rank: int
    times: dict[str, list[float]]

    def best(self, form: str) -> float:
        return min(self.times[form])

    def gain(self, form: str, over: str) -> float:
        """How many times as fast `form` is as `over`."""
        return statistics.median(b / a for a, b in zip(self.times[form], self.times[over], strict=True))


def inputs(rows: int, length: int, rank: int, device: torch.device = CPU) -> ScanArgs:
    """A scan's arguments, float32: unit queries and keys, gates as an adapter starts with."""
    generator = torch.Generator().manual_seed(rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size = (rows, length, 1, rank)
    q, k = (torch.nn.functional.normalize(normal(*size), dim=-1) for _ in range(2))
    beta = torch.sigmoid(normal(*size) - 1.5)
    found = normal(rows, 1, rank, rank), q, k, normal(*size), 1 - beta, beta, beta
    return ScanArgs(*(x.to(device) for x in found))


@torch.no_grad()
def measure(
    rows: int, length: int, rank: int, forms: dict[str, Form], repeats: int, device: torch.device = CPU, calls: int = 0
) -> Cell:
    """Run the forms in turn, `calls` times a round; 0: short ones several times, so that the clock can see them."""
    arguments = inputs(rows, length, rank, device)
    calls = calls or max(1, 256 // max(1, length))
    times: dict[str, list[float]] = {name: [] for name in forms}
    for warm_up in (True, *[False] * repeats):
        for name, form in forms.items():
            start = _now(device)
            for _ in range(calls):
                form(arguments)
            if not warm_up:
                times[name].append((_now(device) - start) / calls)
    return Cell(rows, length, rank, times)


def _now(device: torch.device) -> float:
    if device.type != "cuda":
        return time.thread_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def with_gradients(form: Form) -> Form:
    """The form, and the gradients of all its arguments."""

    @torch.enable_grad()
    def both(arguments: ScanArgs) -> tuple[Tensor, Tensor]:
        given = ScanArgs(*(x.detach().requires_grad_() for x in arguments))
        y, last = form(given)
        torch.autograd.grad(y.sum() + last.sum(), given)
        return y, last

    return both


def blocked(chunk: int) -> Form:
    return lambda arguments: scan_blocked(arguments, chunk=chunk)


def table_cell(length: int, rank: int, repeats: int) -> Cell:
    """All four forms on one row; the blocked one with the chunk the chooser has, or 16 where it takes the loop."""
    chunk = block_length(1, length, rank) or 16
    forms: dict[str, Form] = {
        "plain": scan_reference,
        "tight": scan_loop,
        "blocked": blocked(chunk),
        "chooser": scan,
    }
    return measure(1, length, rank, forms, repeats if length < 8192 else max(3, repeats // 2))


def report(cells: Sequence[Cell]) -> Table:
    table = Table(title="Recurrence on a CPU, one thread, one row; milliseconds, least of the rounds")
    for name in ("rank", "tokens", "plain", "tight", "blocked", "chooser"):
        table.add_column(name, justify="right")
    for name in ("blocked : plain", "blocked : tight", "chooser : tight", "takes"):
        table.add_column(name, justify="right")
    for i, cell in enumerate(cells):
        chunk = block_length(1, cell.length, cell.rank)
        table.add_row(
            str(cell.rank),
            f"{cell.length:,}",
            *(f"{1000 * cell.best(name):.3f}" for name in ("plain", "tight", "blocked", "chooser")),
            f"{cell.gain('blocked', 'plain'):.1f}",
            f"{cell.gain('blocked', 'tight'):.1f}",
            f"{cell.gain('chooser', 'tight'):.2f}",
            f"blocks of {chunk}" if chunk else "tight loop",
            end_section=i + 1 < len(cells) and cells[i + 1].rank != cell.rank,
        )
    return table


def kernel_cell(length: int, rank: int, repeats: int, device: torch.device) -> Cell:
    """`kernels.scan` beside the forms in plain torch, on one row and on one device."""
    chunk = block_length(1, length, rank) or 16
    forms: dict[str, Form] = {
        "plain": scan_reference,
        "blocked": blocked(chunk),
        "kernels": kernels.scan,
        "blocked, gradients": with_gradients(blocked(chunk)),
        "kernels, gradients": with_gradients(kernels.scan),
    }
    return measure(1, length, rank, forms, repeats if length < 8192 else max(3, repeats // 2), device)


def kernel_report(cells: Sequence[Cell], device: torch.device) -> Table:
    names = ("plain", "blocked", "kernels", "blocked, gradients", "kernels, gradients")
    table = Table(title=f"agentmem.kernels.scan on {device.type}, one row; milliseconds, least of the rounds")
    for name in ("rank", "tokens", *names, "kernels : plain", "kernels : blocked", "with gradients, both"):
        table.add_column(name, justify="right")
    for cell in cells:
        table.add_row(
            str(cell.rank),
            f"{cell.length:,}",
            *(f"{1000 * cell.best(name):.3f}" for name in names),
            f"{cell.gain('kernels', 'plain'):.1f}",
            f"{cell.gain('kernels', 'blocked'):.2f}",
            f"{cell.gain('kernels, gradients', 'blocked, gradients'):.2f}",
        )
    return table


def missed(cells: Sequence[Cell]) -> list[str]:
    """The bars that were not reached."""
    found = []
    for cell in cells:
        for over, bar in zip(("plain", "tight"), BARS.get(cell.rank, ()), strict=False):
            gain = cell.gain("blocked", over)
            if cell.length == 8192 and gain < bar:
                found.append(f"rank {cell.rank}: blocked is {gain:.1f} times as fast as {over}, the bar is {bar}")
        blocks = block_length(1, cell.length, cell.rank)
        if blocks and cell.best("chooser") > (1 + NOISE) * cell.best("tight"):
            found.append(f"rank {cell.rank}, {cell.length} tokens: the chooser is slower than the tight loop")
    return found


def grid(console: Console, ranks: Sequence[int], lengths: Sequence[int], repeats: int) -> None:
    """Tight loop against blocks for several rows: where `block_length` should change its mind."""
    table = Table(title="Blocks : tight loop (how many times as fast); * what the chooser takes")
    for name in ("rank", "rows", "tokens", "tight ms", *(f"blocks of {c}" for c in CHUNKS)):
        table.add_column(name, justify="right")
    for rank in ranks:
        for rows in (1, 4, 16):
            for length in (n for n in lengths if n >= 2 * min(CHUNKS)):
                chunks = [c for c in CHUNKS if 2 * c <= length]
                if rows * rank > GRID_SIZE:
                    continue
                forms: dict[str, Form] = {"tight": scan_loop} | {str(c): blocked(c) for c in chunks}
                cell = measure(rows, length, rank, forms, repeats if length < 2048 else max(3, repeats // 3))
                taken = block_length(rows, length, rank)
                gains = [f"{cell.gain(str(c), 'tight'):.2f}{'*' * (c == taken)}" for c in chunks]
                mark = "" if taken else "*"
                tight = f"{1000 * cell.best('tight'):.3f}{mark}"
                table.add_row(str(rank), str(rows), f"{length:,}", tight, *gains)
    console.print(table)


def plot(rows: Sequence[tuple[str, Sequence[Cell]]], path: Path) -> str:
    """Time over length: a row for the CPU and one for the GPU, where there is one; a panel for each rank."""

    def paint(figure: Any) -> None:
        ranks = sorted({cell.rank for _, cells in rows for cell in cells})
        axes = figure.subplots(len(rows), len(ranks), sharey="row", squeeze=False)
        for line, (name, cells) in zip(axes, rows, strict=True):
            for axis, rank in zip(line, ranks, strict=True):
                mine = [cell for cell in cells if cell.rank == rank]
                for form in mine[0].times:
                    style = "k--" if form == "chooser" else "o-"
                    times = [1000 * cell.best(form) for cell in mine]
                    axis.loglog([cell.length for cell in mine], times, style, label=form, markersize=3)
                axis.set(title=f"{name}, rank {rank}", xlabel="tokens")
                axis.grid(alpha=0.3)
            line[0].set_ylabel("milliseconds")
            line[0].legend()

    ranks = {cell.rank for _, cells in rows for cell in cells}
    return picture(path, (4 * len(ranks), 3.6 * len(rows)), paint)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="rounds for each cell")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--grid", action="store_true", help="measure the chooser's thresholds")
    parser.add_argument("--plot", type=Path, default=Path("scan.png"), help="where to put the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gpu = torch.device("cuda") if torch.cuda.is_available() else None
    gpu = gpu if gpu is not None and kernels.runs_triton(gpu) else None
    console = Console(width=None if sys.stdout.isatty() else 140)
    said = {"hardware": hardware(CPU)} | ({} if gpu is None else {"GPU": torch.cuda.get_device_name(gpu)})
    said |= {"dtype": "float32", "versions": versions(), "command": command()}
    console.print(text(said), highlight=False, soft_wrap=True)
    if options.grid:
        grid(console, options.ranks, options.lengths, options.repeats)
        return 0
    cells = [table_cell(n, r, options.repeats) for r in options.ranks for n in options.lengths]
    console.print(report(cells))
    rows = [("CPU", cells)]
    if gpu is None:
        console.print("agentmem.kernels.scan: not timed, needs a CUDA device, Triton and AGENTMEM_TRITON=1")
    else:
        rows.append(("GPU", [kernel_cell(n, r, options.repeats, gpu) for r in options.ranks for n in options.lengths]))
        console.print(kernel_report(rows[1][1], gpu))
    console.print(plot(rows, options.plot), highlight=False)
    failures = missed(cells)
    for line in failures:
        console.print(f"[red]missed:[/red] {line}")
    if not failures:
        console.print("[green]every bar is reached[/green]")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
