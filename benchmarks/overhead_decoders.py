"""Decoding after a prompt, as `overhead.py` measures it: with a cache that grows, or in buffers that never move.

Bare and steered decode behind one KV, filled with random numbers: both write at the same place behind it, and time does
not depend on numbers. So what fits once is measured, and no prompt of half a million tokens has to be read for it.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM

from agentmem import SteeredModel
from agentmem.generation.batch import decode_step
from agentmem.generation.batch_cache import BatchedKVCache
from agentmem.generation.cuda_graph import CapturedDecode, GraphCapturer
from agentmem.generation.runner import ModelRunner

SENTENCE = 32
"""Tokens of a segment."""
_ALIGNED = 256  # tokens: attention over an odd number of them may take another kernel


class Decoder:
    """A prompt that was read, with its keys and values in `cache`, and tokens that follow it one by one.

    Adapters that write by segment do as in a turn: the prompt's pass ends with it, the tokens join the sums of a
    segment that stays open. Given a filled `cache`, the prompt counts as read: of `prompt` only the rows matter.
    """

    def __init__(
        self, model: Qwen3ForCausalLM, steered: SteeredModel | None, prompt: Tensor, cache: DynamicCache | None = None
    ) -> None:
        self._model, self._steered = model, steered
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self._state = steered.zeros(prompt.shape[0]) if steered else None
        self._by_segment = steered is not None and steered.config.write_strategy != "token"
        self._pending: Any = None
        self._token = prompt[:, :1]
        if cache is None:
            self._read(prompt, close=True)

    def step(self) -> None:
        """One more token for every row."""
        self._read(self._token, close=not self._by_segment)
        self.cache.crop(-1)  # so that every step is as dear as the first

    def _read(self, ids: Tensor, *, close: bool) -> None:
        if self._steered is None:
            self._model(input_ids=ids, cache=self.cache, use_cache=True, logits_to_keep=1)
            return
        segments = None
        if self._by_segment:
            segments = (torch.arange(ids.shape[1], device=ids.device) // SENTENCE).expand(ids.shape)
        out = self._steered(
            ids, self._state, cache=self.cache, logits_to_keep=1, segments=segments, pending=self._pending, close=close
        )
        self._state, self._pending = out.state, out.pending


class FixedDecoder:
    """The same in buffers that never move: on a GPU a CUDA graph that is captured once and replayed for each token.

    For the bare model and for adapters that write by token. All rows of `kv` that are taken go on.
    """

    def __init__(self, runner: ModelRunner, kv: BatchedKVCache) -> None:
        self.kv = kv
        self._positions = [row.length for row in kv.rows]
        count = len(self._positions)
        self._states = runner.steered.zeros(count) if runner.steered else None
        like = None if self._states is None else self._states[:1]
        step = partial(decode_step, runner, kv, kv.width)
        self._captured = CapturedDecode(step, _rows(count), like, runner.device, GraphCapturer(runner.device))

    def step(self) -> None:
        """One more token for every row, at the position behind the last one."""
        count = len(self._positions)
        self._captured.run([0] * count, self._positions, [True] * count, self._states)


def side_by_side(
    bare: Qwen3ForCausalLM, model: Qwen3ForCausalLM, steered: SteeredModel, batch: int, length: int, fixed: bool
) -> tuple[Decoder | FixedDecoder, Decoder | FixedDecoder]:
    """Bare and steered behind the same prompts of `length` tokens."""
    if fixed:
        kv = _batched(model, batch, length)
        return FixedDecoder(ModelRunner(bare, None), kv), FixedDecoder(ModelRunner(model, steered), kv)
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    cache = _filled(model, batch, length)
    return Decoder(bare, None, tokens, cache), Decoder(model, steered, tokens, cache)


def _filled(model: Qwen3ForCausalLM, batch: int, length: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for index in range(model.config.num_hidden_layers):
        cache.update(_random(model, batch, length), _random(model, batch, length), index)
    return cache


def _batched(model: Qwen3ForCausalLM, batch: int, length: int) -> BatchedKVCache:
    """A cache of its final size at once, so that there is never a second one beside it."""
    layers = range(model.config.num_hidden_layers)
    # One prompt for all rows: they lie apart in memory, which is all that time depends on.
    own = SimpleNamespace(
        layers=[SimpleNamespace(keys=_random(model, 1, length), values=_random(model, 1, length)) for _ in layers]
    )
    kv = BatchedKVCache(own, (length // _ALIGNED + 1) * _ALIGNED, _rows(batch))
    for _ in range(batch):
        kv.add_row(own, length)
    return kv


def _random(model: Qwen3ForCausalLM, batch: int, length: int) -> Tensor:
    config = model.config
    size = batch, config.num_key_value_heads, length, config.head_dim
    return torch.randn(size, dtype=model.dtype, device=model.device)


def _rows(batch: int) -> int:
    """The power of two that is no less."""
    return 1 << (batch - 1).bit_length()
