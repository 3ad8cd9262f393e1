"""What steering costs: a bare model against the same model steered, in the same run.

    python benchmarks/overhead.py                        small shapes on a CPU, real ones where there is a GPU
    python benchmarks/overhead.py --prefills 0           decoding alone
    python benchmarks/overhead.py --shape qwen3-4b       shapes of your choice (``--shape`` may be repeated)
    python benchmarks/overhead.py --write SSW            another write strategy (TSW, SSW, MSW; may be repeated)
    python benchmarks/overhead.py --fixed                bare and steered both decode in buffers that never move

Weights are random: time does not depend on them. The bare model shares the weights and has no hooks. Bare and steered
take turns, decoding token by token after a prompt, and reading the prompt; a figure is a median, a ratio the median
over the pairs of bare time by steered time, so 1 means that steering is free. On a CPU times are the computing time of
the process, and the ratio by the clock stands beside. Operations a layer are counted by torch's dispatcher. Peak memory
of a prefill is what torch allocated on a GPU, and on a CPU the bytes of the tensors alive, weights included; that of
the bare model is taken before memory is attached. What does not fit is named. The exit code is 1 where a bar is missed;
bars are for a CPU, one thread, TSW of rank 8. On a GPU with AGENTMEM_TRITON=1 and AGENTMEM_CUDA_GRAPHS=1 both decode in
fixed buffers as CUDA graphs, but for SSW, which decodes without.
"""

from __future__ import annotations

import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from overhead_decoders import Decoder, FixedDecoder
from overhead_memory import peak
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

import agentmem
from agentmem import MemoryConfig, SteeredModel
from agentmem.replay import replays

VOCABULARY = 512
"""Of the random models on a CPU: the product with the vocabulary is the same for both, and would hide what differs."""


@dataclass(frozen=True)
class Shape:
    """A Qwen3-like model and where it is measured.

    ``bar_decode``, ``bar_prefill``: what the ratio must reach.
    """

    name: str
    layers: int
    width: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocabulary: int = VOCABULARY
    prompts: tuple[int, ...] = (1024,)
    prefills: tuple[int, ...] = (4096,)
    batches: tuple[int, ...] = (1,)
    bar_decode: float = 0.0
    bar_prefill: float = 0.0

    def model(self, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
        """With random weights."""
        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_dim,
            max_position_embeddings=40_960,
            tie_word_embeddings=True,
        )
        with torch.device(device):
            model = Qwen3ForCausalLM(config).to(dtype)
        return model.eval().requires_grad_(False)


_LONG: dict[str, Any] = {
    "prompts": (1024, 4096, 16_384, 32_768), "prefills": (1024, 8192, 32_768), "batches": (1, 8, 32),
}  # fmt: skip
SMALL = (
    Shape("12 x 1024", 12, 1024, 16, 8, 64, 3072, prompts=(256,), bar_decode=0.98, bar_prefill=0.97),
    Shape("36 x 64", 36, 64, 4, 2, 16, 192, prompts=(256,), prefills=(), bar_decode=0.80),
)
REAL = (
    Shape("qwen3-4b", 36, 2560, 32, 8, 128, 9728, 151_936, **_LONG),
    Shape("qwen3-8b", 36, 4096, 32, 8, 128, 12_288, 151_936, **_LONG),
    Shape("smollm3-3b", 36, 2048, 16, 4, 128, 11_008, 128_256, **_LONG),
)
TINY = Shape("tiny", 2, 32, 2, 1, 16, 64, prompts=(16,), prefills=(32,))
"""To see that the command runs; it measures nothing of use."""

WRITES: dict[str, dict[str, Any]] = {
    "TSW": {"write_strategy": "token"},
    "SSW": {"write_strategy": "sentence"},
    "MSW": {"write_strategy": "token", "num_state_heads": 4},
}


@dataclass(frozen=True)
class Figure:
    """Median seconds of bare and steered, the median ratio of their pairs, and that of the wall clock."""

    bare: float
    steered: float
    ratio: float
    wall: float


class _Counting(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


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
    """The same model with the same weights in memory, which no hook of the other reaches."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(one): one for one in tensors})


@contextmanager
def steering(model: Qwen3ForCausalLM, rank: int, write: str) -> Iterator[SteeredModel]:
    """The model with random memory weights; taken off at the end."""
    with torch.inference_mode(False):
        steered = SteeredModel.attach(model, config=MemoryConfig(rank=rank, alpha=2.0 * rank, **WRITES[write]))
        for name, parameter in steered.memory.named_parameters():
            if "delta_" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
        steered.memory.requires_grad_(False)
    try:
        yield steered
    finally:
        steered.detach()


def operations(
    bare: Qwen3ForCausalLM, model: Qwen3ForCausalLM, steered: SteeredModel, layers: int
) -> tuple[float, float]:
    """Operations a layer and token that are no views: of the bare model, and what steering adds."""
    counts = []
    prompt = torch.zeros(1, 8, dtype=torch.int64, device=model.device)
    for decoder in (Decoder(bare, None, prompt), Decoder(model, steered, prompt)):
        decoder.step()
        with _Counting() as counting:
            decoder.step()
        counts.append(counting.count)
    return counts[0] / layers, (counts[1] - counts[0]) / layers


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
    fixed = fixed or replays(device)
    chosen = [known[name] for name in _known(shape, known)] if shape else list(REAL if cuda else SMALL)
    writes = _known(write, WRITES) if write else list(WRITES)
    console = Console(width=140)
    hardware = torch.cuda.get_device_name() if cuda else f"{processor()}, {threads} thread(s)"
    console.print(f"{hardware}, {dtype}, rank {rank}; Python {platform.python_version()}, torch {torch.__version__}, "
                  f"transformers {transformers.__version__}, agentmem {agentmem.__version__}\n"
                  f"python {' '.join(sys.argv)}", highlight=False)  # fmt: skip
    table = Table("model", "what", "bare", "steered", "bare : steered", "by the clock", "bar")
    found: list[tuple[str, float]] = []
    held = True
    with torch.inference_mode():
        for one in chosen:
            model = one.model(device, dtype)
            bare = bare_copy(model)
            console.print(
                f"{one.name}: {one.layers} layers x {one.width}, {one.heads} heads ({one.key_heads} of keys) x "
                f"{one.head_dim}, inner {one.inner}, vocabulary {one.vocabulary:,}", highlight=False,
            )  # fmt: skip
            alone = _peaks(one, bare, None) if prefills else {}
            for way in writes:
                with steering(model, rank, way) as steered:
                    base, added = operations(bare, model, steered, one.layers)
                    table.add_row(one.name, f"{way}: operations a layer", f"{base:.0f}", f"+{added:.1f}")
                    for what, figure, bar in _figures(one, bare, model, steered, steps, prefills, fixed):
                        counts = bar > 0 and not (cuda or fixed) and way == "TSW" and rank == 8 and threads == 1
                        if figure is None:
                            table.add_row(one.name, f"{way}: {what}", "does not fit")
                            continue
                        held &= not counts or figure.ratio >= bar
                        found.append((f"{one.name}, {way}, {what}", figure.ratio))
                        table.add_row(
                            one.name, f"{way}: {what}", f"{1e3 * figure.bare:.2f} ms", f"{1e3 * figure.steered:.2f} ms",
                            f"{figure.ratio:.3f}", f"{figure.wall:.3f}",
                            f"{bar:.2f} {'held' if figure.ratio >= bar else 'missed'}" if counts else "",
                        )  # fmt: skip
                    for length, most in (_peaks(one, model, steered) if prefills else {}).items():
                        before = alone[length]
                        if most is not None and before is not None:
                            table.add_row(
                                one.name, f"{way}: peak memory, prefill of {length:,}", f"{before / 2**20:.1f} MB",
                                f"{most / 2**20:.1f} MB", f"{100 * (most / before - 1):+.2f} %",
                            )  # fmt: skip
            del model, bare
    console.print(table)
    _draw(found, plot)
    console.print(f"picture: {plot}", highlight=False)
    raise typer.Exit(0 if held else 1)


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
) -> Iterator[tuple[str, Figure | None, float]]:
    """What was measured, its figure (None = there is too little memory) and its bar."""
    decoder: Any = FixedDecoder if fixed and steered.config.write_strategy == "token" else Decoder
    for length in shape.prompts:
        for batch in shape.batches:
            what = f"decode after {length:,}, batch {batch}" + ", fixed" * (decoder is FixedDecoder)
            try:
                ids = _ids(model, batch, length)
                one, other = decoder(bare, None, ids), decoder(model, steered, ids)
                figure = compare(one.step, other.step, steps)
            except torch.OutOfMemoryError:
                yield what, None, shape.bar_decode
            else:
                yield what, figure, shape.bar_decode
            one = other = None  # type: ignore[assignment]
    for length in shape.prefills if prefills else ():
        ids = _ids(model, 1, length)
        read = partial(_read, bare, None, ids), partial(_read, model, steered, ids)
        try:
            yield f"prefill of {length:,}", compare(*read, prefills), shape.bar_prefill
        except torch.OutOfMemoryError:
            yield f"prefill of {length:,}", None, shape.bar_prefill


def _read(model: Qwen3ForCausalLM, steered: SteeredModel | None, ids: Tensor) -> None:
    Decoder(model, steered, ids)


def _draw(found: Sequence[tuple[str, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names, ratios = zip(*found, strict=True)
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(names) + 1.2), layout="constrained")
    axes.barh(names, ratios)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("bare time : steered time")
    axes.invert_yaxis()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    typer.run(main)
