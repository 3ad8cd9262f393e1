"""Decoding after a prompt, as ``overhead.py`` measures it: with a cache that grows, or in buffers that never move."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM

from agentmem import SteeredModel
from agentmem.replay import Replay
from agentmem.seating import Block

SENTENCE = 32
"""Tokens of a segment."""


class Decoder:
    """A prompt that was read, with its keys and values in ``cache``, and tokens that follow it one by one."""

    def __init__(self, model: Qwen3ForCausalLM, steered: SteeredModel | None, prompt: Tensor) -> None:
        self._model, self._steered = model, steered
        self.cache = DynamicCache(config=model.config)
        self._state = steered.zeros(prompt.shape[0]) if steered else None
        self._by_segment = steered is not None and steered.config.write_strategy != "token"
        self._pending: Any = None
        self._token = prompt[:, :1]
        self._read(prompt)

    def step(self) -> None:
        """One more token for every row."""
        self._read(self._token)
        self.cache.crop(-1)  # so that every step is as dear as the first

    def _read(self, ids: Tensor) -> None:
        if self._steered is None:
            self._model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return
        segments = None
        if self._by_segment:
            segments = (torch.arange(ids.shape[1], device=ids.device) // SENTENCE).expand(ids.shape)
        out = self._steered(
            ids, self._state, cache=self.cache, logits_to_keep=1, segments=segments, pending=self._pending,
            close=not self._by_segment,
        )  # fmt: skip
        self._state, self._pending = out.state, out.pending


class FixedDecoder:
    """The same in buffers that never move: on a GPU a CUDA graph that is captured once and replayed for each token.

    For the bare model and for adapters that write by token.
    """

    def __init__(self, model: Qwen3ForCausalLM, steered: SteeredModel | None, prompt: Tensor) -> None:
        batch, self._length = prompt.shape
        read = Decoder(model, steered, prompt).cache
        block: Any = None
        for row in range(batch):
            parts = [
                SimpleNamespace(keys=layer.keys[row : row + 1], values=layer.values[row : row + 1])
                for layer in read.layers
            ]
            own = SimpleNamespace(layers=parts)
            block = block or Block(own, self._length + 1)
            block.sit(own, self._length)
        self._states = steered.zeros(batch) if steered else None
        rows = 1 << (batch - 1).bit_length()
        runtime: Any = SimpleNamespace(device=prompt.device, model=model, steered=steered)
        self._replay = Replay(runtime, block, rows, None if self._states is None else self._states[:1])
        self._batch = batch

    def step(self) -> None:
        """One more token for every row, at the place of the last one."""
        count = self._batch
        self._replay.run([0] * count, [self._length] * count, [True] * count, self._states)
