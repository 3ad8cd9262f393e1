"""What steering costs: a bare model against the same model steered, in the same run.

    python benchmarks/overhead.py                        small shapes on a CPU, real ones where there is a GPU
    python benchmarks/overhead.py --prefills 0           decoding alone
    python benchmarks/overhead.py --shape qwen3-4b       shapes of your choice (``--shape`` may be repeated)
    python benchmarks/overhead.py --write SSW            another write strategy (TSW, SSW, MSW; may be repeated)
    python benchmarks/overhead.py --fixed                bare and steered both decode in buffers that never move

Weights are random: time does not depend on them. The bare model shares the weights and has no memory. Bare and steered
take turns, decoding token by token behind one and the same KV of random numbers, and reading the prompt of one session
(until it is written, for SSW too); a figure is a median, a ratio the median over the pairs of bare time by steered
time, so 1 means that steering is free. On a CPU times are the computing time of the process, and the ratio by the clock
stands beside. Operations a layer are counted by torch's dispatcher, so the calls that numba compiles on a CPU are not
among them; on a GPU torch's profiler counts kernels too, in a step outside CUDA graphs, which replay the same ones.
Peak memory of a prefill is what torch allocated on a GPU, and on a CPU the bytes of the tensors alive, weights
included; that of the bare model is taken before memory is attached. What does not fit is named.

The exit code is 1 where a bar is missed or could not be measured. Bars (``shapes.py``) are for TSW of rank 8: on a CPU
for one thread, on a GPU for Qwen3-4B's shape under AGENTMEM_TRITON=1 and AGENTMEM_CUDA_GRAPHS=1. With these two both
decode in fixed buffers as CUDA graphs, but for SSW, which decodes without.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from conditions import conditions, picture, text
from counting import kernels, operations
from overhead_decoders import Decoder, side_by_side
from overhead_memory import peak
from rich.console import Console
from rich.table import Table
from shapes import REAL, SMALL, TINY, WRITES, Case, Shape, attached
from torch import Tensor
from transformers import Qwen3ForCausalLM

from agentmem import SteeredModel
from agentmem.generation.cuda_graph import uses_graphs
from agentmem.kernels import runs_numba


@dataclass(frozen=True)
class Figure:
    """Median seconds of bare and steered, the median ratio of their pairs, and that of the wall clock."""

    bare: float
    steered: float
    ratio: float
    wall: float


def compare(bare: Callable[[], None], steered: Callable[[], None], pairs: int) -> Figure:
    """Run the two in turn, the first of each pair changing."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: list[tuple[float, float]] = []
    walls: list[float] = []
    for pair in range(pairs + 1):
        seconds, wall = {}, {}
        for run in (bare, steered) if pair % 2 else (steered, bare):
            _settle()
            begin, start = clock(), time.perf_counter()
            run()
            _settle()
            seconds[run], wall[run] = clock() - begin, time.perf_counter() - start
        if pair:  # the first warms up
            times.append((seconds[bare], seconds[steered]))
            walls.append(wall[bare] / wall[steered])
    a, b = zip(*times, strict=True)
    ratio = statistics.median(x / y for x, y in times)
    return Figure(statistics.median(a), statistics.median(b), ratio, statistics.median(walls))


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bare_copy(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """The same model with the same weights in memory, which has nothing of the other on it."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(one): one for one in tensors})


@dataclass
class Report:
    """The table, the ratios that are drawn, and whether all bars were held."""

    table: Table
    ratios: list[tuple[str, float]] = field(default_factory=list)
    held: bool = True

    def time(self, model: str, what: str, figure: Figure | None, bar: float | None) -> None:
        """A decode or prefill and the least ratio it must have; no figure: there was too little memory."""
        if figure is None:
            self.held &= bar is None
            self.table.add_row(
                model, what, "does not fit", "", "", "", "" if bar is None else f"{bar:.2f}: not measured"
            )
            return
        self.ratios.append((f"{model}, {what}", figure.ratio))
        self.table.add_row(
            model, what, f"{1e3 * figure.bare:.2f} ms", f"{1e3 * figure.steered:.2f} ms", f"{figure.ratio:.3f}",
            f"{figure.wall:.3f}", "" if bar is None else f"{bar:.2f} {self._verdict(figure.ratio >= bar)}",
        )  # fmt: skip

    def memory(self, model: str, what: str, bare: float, steered: float, bar: float | None) -> None:
        """The most bytes, and by how many percent those of the steered model may be more."""
        more = 100 * (steered / bare - 1)
        self.table.add_row(
            model, what, f"{bare / 2**20:.1f} MB", f"{steered / 2**20:.1f} MB", f"{more:+.2f} %", "",
            "" if bar is None else f"{bar:+.2f} % {self._verdict(more <= bar)}",
        )  # fmt: skip

    def count(self, model: str, what: str, found: tuple[float, float] | None) -> None:
        """For a layer and token: of the bare model, and what steering adds."""
        said = ("not known", "") if found is None else (f"{found[0]:.0f}", f"+{found[1]:.1f}")
        self.table.add_row(model, what, *said)

    def _verdict(self, held: bool) -> str:
        self.held &= held
        return "held" if held else "missed"


@contextmanager
def steering(model: Qwen3ForCausalLM, rank: int, write: str) -> Iterator[SteeredModel]:
    """The model with random memory weights; taken off at the end."""
    steered = attached(model, rank, write)
    try:
        yield steered
    finally:
        steered.detach()


def counted(
    bare: Qwen3ForCausalLM, model: Qwen3ForCausalLM, steered: SteeredModel, count: Callable[[Callable[[], None]], Any]
) -> tuple[float, float] | None:
    """By ``count``, for a layer and token: of the bare model, and what steering adds; None = not known."""
    prompt = torch.zeros(1, 8, dtype=torch.int64, device=model.device)
    decoders = Decoder(bare, None, prompt), Decoder(model, steered, prompt)
    base, other = (count(one.step) for one in decoders)
    if base is None or other is None:
        return None
    layers = model.config.num_hidden_layers
    return base / layers, (other - base) / layers


def main(
    shape: Annotated[list[str] | None, typer.Option(help="Shapes by name; all that suit this machine.")] = None,
    write: Annotated[list[str] | None, typer.Option(help="TSW, SSW, MSW; all of them.")] = None,
    rank: Annotated[int, typer.Option(help="Of the memory.")] = 8,
    steps: Annotated[int, typer.Option(help="Pairs of decoding steps.")] = 60,
    prefills: Annotated[int, typer.Option(help="Pairs of prefills; 0 = leave them out.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 1,
    fixed: Annotated[bool, typer.Option(help="Decode in fixed buffers; as CUDA graphs where there is a GPU.")] = False,
    plot: Annotated[Path, typer.Option(help="Where to put the picture of the ratios.")] = Path("overhead.png"),
) -> None:
    """Measure what steering costs on this machine."""
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    known = {one.name: one for one in (*SMALL, *REAL, TINY)}
    fixed = fixed or uses_graphs(device)
    chosen = [known[name] for name in _known(shape, known)] if shape else list(REAL if cuda else SMALL)
    writes = _known(write, WRITES) if write else list(WRITES)
    console = Console(width=140)
    console.print(text(conditions(device, dtype) | {"rank": str(rank)}), highlight=False, soft_wrap=True)
    beside = ", numba's calls beside" if runs_numba(torch.empty(0, dtype=dtype, device=device)) else ""
    report = Report(Table("model", "what", "bare", "steered", "bare : steered", "by the clock", "bar"))
    with torch.inference_mode():
        for one in chosen:
            model = one.model(device, dtype)
            bare = bare_copy(model)
            console.print(str(one), highlight=False)
            alone = _peaks(one, bare, None) if prefills else {}
            for way in writes:
                bars = one.bars if one.judged(device, way, rank, fixed) else {}
                with steering(model, rank, way) as steered:
                    found = counted(bare, model, steered, operations)
                    report.count(one.name, f"{way}: torch's operations a layer{beside}", found)
                    if cuda:
                        found = counted(bare, model, steered, kernels)
                        report.count(one.name, f"{way}: kernels a layer, by the profiler", found)
                    for what, case, figure in _figures(one, bare, model, steered, steps, prefills, fixed):
                        report.time(one.name, f"{way}: {what}", figure, bars.get(case))
                    for length, most in (_peaks(one, model, steered) if prefills else {}).items():
                        before, what = alone[length], f"{way}: peak memory, prefill of {length:,}"
                        if most is not None and before is not None:
                            report.memory(one.name, what, before, most, bars.get(("peak", 1, length)))
            del model, bare
    console.print(report.table)
    console.print(_drawn(report.ratios, plot), highlight=False)
    raise typer.Exit(0 if report.held else 1)


def _known(asked: Sequence[str] | None, known: Mapping[str, object]) -> list[str]:
    if unknown := sorted(set(asked or ()) - known.keys()):
        raise typer.BadParameter(f"no {', '.join(unknown)}; there are {', '.join(known)}")
    return list(asked or ())


def _ids(model: Qwen3ForCausalLM, batch: int, length: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length), device=model.device)


def _peaks(shape: Shape, model: Qwen3ForCausalLM, steered: SteeredModel | None) -> dict[int, int | None]:
    """Peak memory of a prefill, by its length; the second of two, since the first fills what is kept."""
    held = (model,) if steered is None else (model, steered.memory)
    found: dict[int, int | None] = {}
    for length in shape.prefills:
        ids = _ids(model, 1, length)
        try:
            Decoder(model, steered, ids)
            found[length] = peak(partial(Decoder, model, steered, ids), *held)
        except torch.OutOfMemoryError:
            found[length] = None
    return found


def _figures(
    shape: Shape,
    bare: Qwen3ForCausalLM,
    model: Qwen3ForCausalLM,
    steered: SteeredModel,
    steps: int,
    prefills: int,
    fixed: bool,
) -> Iterator[tuple[str, Case, Figure | None]]:
    """What was measured and its figure; None = there is too little memory."""
    fixed = fixed and steered.config.write_strategy == "token"
    for length in shape.prompts:
        for batch in shape.batches:
            what = f"decode after {length:,}, batch {batch}" + ", fixed" * fixed
            yield what, ("decode", batch, length), _decoded(bare, model, steered, batch, length, fixed, steps)
    for length in shape.prefills if prefills else ():
        ids = _ids(model, 1, length)
        read = partial(_read, bare, None, ids), partial(_read, model, steered, ids)
        yield f"prefill of {length:,}", ("prefill", 1, length), _fitting(partial(compare, *read, prefills))


def _decoded(
    bare: Qwen3ForCausalLM,
    model: Qwen3ForCausalLM,
    steered: SteeredModel,
    batch: int,
    length: int,
    fixed: bool,
    steps: int,
) -> Figure | None:
    def measured() -> Figure:
        one, other = side_by_side(bare, model, steered, batch, length, fixed)
        return compare(one.step, other.step, steps)

    return _fitting(measured)


def _fitting(measured: Callable[[], Figure]) -> Figure | None:
    """None where it does not fit. What it held is free again when this returns, batched caches too, whose rows know
    them."""
    try:
        return measured()
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _read(model: Qwen3ForCausalLM, steered: SteeredModel | None, ids: Tensor) -> None:
    Decoder(model, steered, ids)


def _drawn(ratios: Sequence[tuple[str, float]], path: Path) -> str:
    names, values = zip(*ratios, strict=True) if ratios else ((), ())

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.barh(names, values)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("bare time : steered time")
        axes.invert_yaxis()

    return picture(path, (8, 0.4 * len(names) + 1.2), paint)


if __name__ == "__main__":
    typer.run(main)
