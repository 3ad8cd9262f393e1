"""What steering costs: a bare model against the same model steered, in the same run.

    python benchmarks/overhead.py                        small shapes on a CPU, real ones where there is a GPU
    python benchmarks/overhead.py --prefills 0           decoding alone: a minute on a CPU
    python benchmarks/overhead.py --shape qwen3-4b       shapes of your choice (``--shape`` may be repeated)
    python benchmarks/overhead.py --rank 8 --plot o.png  another adapter, and a picture (needs matplotlib)

Weights are random: time does not depend on them. Bare and steered take turns, decoding token by token after a prompt,
and reading the prompt; a figure is a median, a ratio the median over the pairs of bare time by steered time, so 1 means
that steering is free. Operations a layer are counted by torch's dispatcher. The exit code is 1 where a bar is missed.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

import agentmem
from agentmem import MemoryConfig, SteeredModel

VOCABULARY = 512
"""Of the random models on a CPU: the product with the vocabulary is the same for both, and would hide what differs."""


@dataclass(frozen=True)
class Shape:
    """A Qwen3-like model and where it is measured.

    ``bars``: what the ratio must reach, by batch for decoding and "prefill".
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


SMALL = (
    Shape("12 x 1024", 12, 1024, 16, 8, 64, 3072, prompts=(256,), bar_decode=0.98, bar_prefill=0.97),
    Shape("36 x 64", 36, 64, 4, 2, 16, 192, prompts=(256,), prefills=(), bar_decode=0.80),
)
REAL = (
    Shape(
        "qwen3-4b", 36, 2560, 32, 8, 128, 9728, 151_936, (1024, 4096, 16_384, 32_768), (1024, 8192, 32_768), (1, 8, 32)
    ),
    Shape("qwen3-8b", 36, 4096, 32, 8, 128, 12_288, 151_936, (1024, 16_384), (8192,), (1, 32)),
    Shape("smollm3-3b", 36, 2048, 16, 4, 128, 11_008, 128_256, (1024, 16_384), (8192,), (1, 32)),
)


@dataclass(frozen=True)
class Figure:
    """Median seconds of bare and steered, and the median ratio of their pairs."""

    bare: float
    steered: float
    ratio: float


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
    times: list[tuple[float, float]] = []
    for pair in range(pairs + 1):
        seconds = {}
        for run in (bare, steered) if pair % 2 else (steered, bare):
            _settle()
            begin = time.perf_counter()
            run()
            _settle()
            seconds[run] = time.perf_counter() - begin
        if pair:  # the first warms up
            times.append((seconds[bare], seconds[steered]))
    a, b = zip(*times, strict=True)
    return Figure(statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in times))


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Decoder:
    """A prompt that was read, and tokens that follow it one by one."""

    def __init__(self, model: Qwen3ForCausalLM, steered: SteeredModel | None, prompt: Tensor) -> None:
        self._model, self._steered = model, steered
        self._cache = DynamicCache(config=model.config)
        self._state = steered.zeros(prompt.shape[0]) if steered else None
        self._token = prompt[:, :1]
        self._read(prompt)
        self._length = prompt.shape[1]

    def step(self) -> None:
        """One more token for every row."""
        self._read(self._token)
        self._cache.crop(-1)  # so that every step is as dear as the first

    def _read(self, ids: Tensor) -> None:
        if self._steered is None:
            self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        else:
            self._state = self._steered(ids, self._state, cache=self._cache, logits_to_keep=1).state


@contextmanager
def steering(model: Qwen3ForCausalLM, rank: int) -> Iterator[SteeredModel]:
    """The model with random memory weights; taken off at the end."""
    with torch.inference_mode(False):
        steered = SteeredModel.attach(model, config=MemoryConfig(rank=rank, alpha=2.0 * rank))
        for name, parameter in steered.memory.named_parameters():
            if "delta_" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
        steered.memory.requires_grad_(False)
    try:
        yield steered
    finally:
        steered.detach()


def operations(model: Qwen3ForCausalLM, steered: SteeredModel, layers: int) -> tuple[float, float]:
    """Operations a layer and token that are no views: of the bare model, and what steering adds."""
    counts = []
    prompt = torch.zeros(1, 8, dtype=torch.int64, device=model.device)
    for one in (None, steered):
        decoder = Decoder(model, one, prompt)
        decoder.step()
        with _Counting() as counting:
            decoder.step()
        counts.append(counting.count)
    return counts[0] / layers, (counts[1] - counts[0]) / layers


def prefill(model: Qwen3ForCausalLM, steered: SteeredModel, length: int, pairs: int) -> Figure:
    """Reading a prompt."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)
    return compare(
        lambda: Decoder(model, None, ids) and None,
        lambda: Decoder(model, steered, ids) and None,
        pairs,
    )


def main(
    shape: Annotated[list[str] | None, typer.Option(help="Shapes by name; all that suit this machine.")] = None,
    rank: Annotated[int, typer.Option(help="Of the memory.")] = 8,
    steps: Annotated[int, typer.Option(help="Pairs of decoding steps.")] = 60,
    prefills: Annotated[int, typer.Option(help="Pairs of prefills; 0 = leave them out.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="A picture of the ratios.")] = None,
) -> None:
    """Measure what steering costs on this machine."""
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    known = {one.name: one for one in (*SMALL, *REAL)}
    if unknown := sorted(set(shape or ()) - known.keys()):
        raise typer.BadParameter(f"no shape {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in shape] if shape else list(REAL if cuda else SMALL)
    console = Console()
    hardware = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    console.print(f"{hardware}, {threads} thread(s), {dtype}, rank {rank}; Python {platform.python_version()}, torch "
                  f"{torch.__version__}, transformers {transformers.__version__}, agentmem {agentmem.__version__}",
                  highlight=False)  # fmt: skip
    table = Table("model", "what", "bare, ms", "steered, ms", "bare : steered", "bar")
    found: list[tuple[str, float]] = []
    held = True
    with torch.inference_mode():
        for one in chosen:
            model = one.model(device, dtype)
            with steering(model, rank) as steered:
                base, added = operations(model, steered, one.layers)
                table.add_row(one.name, f"operations a layer: {base:.0f}, and {added:.1f} more", "", "", "", "")
                for what, figure, bar in _figures(one, model, steered, steps, prefills):
                    fits = figure.ratio >= bar
                    held &= fits
                    found.append((f"{one.name}, {what}", figure.ratio))
                    table.add_row(
                        one.name, what, f"{1e3 * figure.bare:.2f}", f"{1e3 * figure.steered:.2f}",
                        f"{figure.ratio:.3f}", f"{bar:.2f} {'held' if fits else 'missed'}" if bar else "",
                    )  # fmt: skip
            del model
    console.print(table)
    if plot is not None:
        _draw(found, plot)
    raise typer.Exit(0 if held else 1)


def _figures(
    shape: Shape, model: Qwen3ForCausalLM, steered: SteeredModel, steps: int, prefills: int
) -> Iterator[tuple[str, Figure, float]]:
    for length in shape.prompts:
        for batch in shape.batches:
            try:
                ids = torch.randint(0, shape.vocabulary, (batch, length), device=model.device)
                bare, other = Decoder(model, None, ids), Decoder(model, steered, ids)
                figure = compare(bare.step, other.step, steps)
            except torch.OutOfMemoryError:
                continue
            yield f"decode after {length:,}, batch {batch}", figure, shape.bar_decode
    for length in shape.prefills if prefills else ():
        yield f"prefill of {length:,}", prefill(model, steered, length, prefills), shape.bar_prefill


def _draw(found: Sequence[tuple[str, float]], path: Path) -> None:
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
