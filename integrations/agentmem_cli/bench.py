"""What memory costs on this machine: the user's own model with and without it, and several sessions at once.

Both measurements use the same loaded weights; the bare passes do not go through the memory. The two passes of a pair
run one after the other, in alternating order, and a ratio is the median over pairs, so that other load on the machine
affects both alike. The figures are of this machine at this moment; `benchmarks/` measures the same with more care.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from agentmem import Message, Sampling, __version__
from agentmem.errors import ConfigError, MissingAdapterError
from agentmem_cli.options import Loading

if TYPE_CHECKING:
    from agentmem import Engine

_SENTENCE = 32  # tokens per sentence of the prompt, for adapters that write by sentence


@dataclass(frozen=True)
class Pair:
    """Median seconds with and without memory, and the median over pairs of bare time divided by time with memory."""

    bare: float
    steered: float
    ratio: float


@dataclass(frozen=True)
class Rate:
    """Tokens per second with a number of sessions at once."""

    sessions: int
    tokens_per_second: float


@dataclass(frozen=True)
class Figures:
    """The measured figures.

    Attributes:
        decode: for one token.
        prefill: for the whole prompt.
        prompt: length of the prompt in tokens.
        state_bytes: what a session keeps between turns.
        kv_bytes: the size of its prompt's KV during a turn.
        adapter_bytes: the memory's weights, loaded once for all sessions.
        rates: for several numbers of sessions that decode at once.
        machine: where it was measured.
    """

    decode: Pair
    prefill: Pair
    prompt: int
    state_bytes: int
    kv_bytes: int
    adapter_bytes: int
    rates: list[Rate]
    machine: str


def bench(
    loading: Loading,
    prompt: int,
    pairs: int,
    reply: int,
    sessions: Sequence[int],
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure and print.

    Raises:
        MissingAdapterError: the model has no memory.
        ConfigError: the prompt is longer than the model's context.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with loading.load() as engine:
        figures = measure(engine, prompt, pairs, reply, sessions)
    if as_json:
        print(json.dumps(asdict(figures), indent=1))
    else:
        Console().print(*_tables(figures), highlight=False, sep="\n")


def measure(engine: Engine, prompt: int, pairs: int, reply: int, sessions: Sequence[int]) -> Figures:
    """All figures for one engine, which must do nothing else meanwhile."""
    steered = engine.steered
    if steered is None:
        raise MissingAdapterError("this model has no adapter, so there is no steering to measure; name one: --adapter")
    if prompt + pairs > engine.max_tokens_limit:
        raise ConfigError(f"--prompt is at most {engine.max_tokens_limit - pairs} for this model; found {prompt}")
    with torch.inference_mode():
        ids = torch.randint(0, len(engine.tokenizer), (1, prompt), device=engine.model.device)
        prefill = _compare(lambda: _Reader(engine, ids, memory=False), lambda: _Reader(engine, ids, memory=True), pairs)
        bare, other = (_Reader(engine, ids, memory=memory) for memory in (False, True))
        decode = _compare(bare.step, other.step, 4 * pairs)
        state = steered.zeros(1)
    return Figures(
        decode=decode,
        prefill=prefill,
        prompt=prompt,
        state_bytes=state.numel() * state.element_size(),
        kv_bytes=sum(t.numel() * t.element_size() for layer in other.cache.layers for t in (layer.keys, layer.values)),
        adapter_bytes=sum(p.numel() * p.element_size() for p in steered.memory.parameters()),
        rates=[Rate(count, _rate(engine, count, reply)) for count in sessions],
        machine=_machine(engine),
    )


class _Reader:
    """A prompt that was read, and tokens that follow it one by one.

    An adapter that writes by message or sentence works as in a turn: the prompt's pass ends with the prompt, and the
    tokens after it are added to the sums of a pass that stays open.
    """

    def __init__(self, engine: Engine, ids: torch.Tensor, *, memory: bool) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()
        self._engine = engine
        self._steered = engine.steered if memory else None
        self._state = None if self._steered is None else self._steered.zeros(1)
        self._pending: Any = None
        self._token = ids[:, :1]
        self._read(ids, close=True)
        _settle(engine)

    def step(self) -> None:
        """Read one more token and then drop it again, so that every step costs as much as the first."""
        self._read(self._token, close=False)
        _settle(self._engine)
        self.cache.crop(-1)

    def _read(self, ids: torch.Tensor, *, close: bool) -> None:
        if self._steered is None:
            self._engine.model(input_ids=ids, cache=self.cache, use_cache=True, logits_to_keep=1)
            return
        strategy, segments = self._steered.config.write_strategy, None
        if strategy != "token":
            length = ids.shape[1] if strategy == "message" else _SENTENCE
            segments = (torch.arange(ids.shape[1], device=ids.device) // length).expand(ids.shape)
        out = self._steered(
            ids, self._state, cache=self.cache, logits_to_keep=1, segments=segments, pending=self._pending, close=close
        )
        self._state, self._pending = out.state, out.pending


def _compare(bare: Callable[[], object], steered: Callable[[], object], pairs: int) -> Pair:
    times = []
    for number in range(-1, pairs):  # the first pair is a warm-up
        seconds = {}
        for way in (bare, steered) if number % 2 == 0 else (steered, bare):
            begin = time.perf_counter()
            way()
            seconds[way] = time.perf_counter() - begin
        if number >= 0:
            times.append((seconds[bare], seconds[steered]))
    a, b = zip(*times, strict=True)
    return Pair(statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in times))


def _rate(engine: Engine, count: int, reply: int) -> float:
    """Tokens per second of sessions with short prompts, at a temperature at which no reply ends early."""

    def say(number: int) -> int:
        sampling = Sampling(temperature=50.0, seed=number, max_tokens=reply)
        return len(engine.turn([Message("user", f"My number is {number}.")], sampling=sampling).token_ids)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(say, range(count)))  # warm-up
        engine.forget_prefills()
        begin = time.perf_counter()
        tokens = sum(pool.map(say, range(count)))
        return tokens / (time.perf_counter() - begin)


def _settle(engine: Engine) -> None:
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize()


def _machine(engine: Engine) -> str:
    device = engine.model.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return (
        f"{engine.name} in {str(engine.model.dtype).removeprefix('torch.')} on {device.type} ({name}, {os.cpu_count()} "
        f"cores, {torch.get_num_threads()} threads); torch {torch.__version__}, agentmem {__version__}"
    )


def _tables(figures: Figures) -> list[Table | str]:
    cost = Table("what", "bare, ms", "steered, ms", "bare : steered", title="what steering costs here")
    for name, pair in (("a token", figures.decode), (f"a prompt of {figures.prompt:,} tokens", figures.prefill)):
        cost.add_row(name, f"{1e3 * pair.bare:.2f}", f"{1e3 * pair.steered:.2f}", f"{pair.ratio:.3f}")
    size = Table("memory", "bytes")
    size.add_row("state of a session, kept between turns", f"{figures.state_bytes:,}")
    size.add_row("KV of that prompt, while a turn runs", f"{figures.kv_bytes:,}")
    size.add_row("adapter, once for all sessions", f"{figures.adapter_bytes:,}")
    rates = Table("sessions at once", "tokens/s")
    for rate in figures.rates:
        rates.add_row(f"{rate.sessions}", f"{rate.tokens_per_second:,.0f}")
    return [cost, size, rates, figures.machine]
