"""Frozen features: what the layers below the memory make of a text, computed once and kept.

These layers neither read the memory nor get a gradient, so for a text they give the same in every step of a run, for
every adapter. Where texts come back (a file that is read several times; what several conversations have in common) the
model then starts at the lowest layer with memory. Kept are the inputs of that layer, up to a limit of bytes; the texts
that were used longest ago go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from agentmem.training.hidden import inputs_of

_ROWS = 32  # texts that are computed together
Text = tuple[int, ...]


class FrozenFeatures:
    """Keeps the inputs of a model's layer `lowest`, [T, D] for each text.

    Args:
        model: a causal language model of transformers.
        lowest: the number of the lowest layer with memory, at least 1.
        limit: the most bytes that are kept.

    Attributes:
        computed, found: how many tokens went through the layers below, and how many did not have to.
    """

    def __init__(self, model: Any, lowest: int, limit: int) -> None:
        self.computed = self.found = 0
        self._model, self._lowest, self._limit = model, lowest, limit
        self._kept: OrderedDict[Text, Tensor] = OrderedDict()
        self._bytes = 0

    def rows(self, layout: Mapping[str, Any]) -> Tensor:
        """The features of a layout (see `examples.collate`), [N, T, D]; zeros for padding."""
        ids, blocks = layout["ids"], layout.get("blocks")
        if blocks is None:
            blocks = layout["mask"] - 1  # a row is one text
        places = [
            (row, torch.nonzero(blocks[row] == block).squeeze(-1))
            for row in range(len(ids))
            for block in range(int(blocks[row].max()) + 1)
        ]
        texts = [tuple(ids[row, columns].tolist()) for row, columns in places]
        found = self._of(texts)
        features: Tensor = ids.new_zeros(*ids.shape, found[0].shape[-1], dtype=found[0].dtype)
        for (row, columns), feature in zip(places, found, strict=True):
            features[row, columns] = feature.to(features.device)
        return features

    def _of(self, texts: Sequence[Text]) -> list[Tensor]:
        missing = sorted({text for text in texts if text not in self._kept}, key=len)  # of one length: little padding
        new: dict[Text, Tensor] = {}
        for start in range(0, len(missing), _ROWS):
            chosen = missing[start : start + _ROWS]
            new.update(zip(chosen, self._compute(chosen), strict=True))
        self.computed += sum(map(len, missing))
        self.found += sum(map(len, texts)) - sum(map(len, missing))
        out = []
        for text in texts:
            if text in self._kept:
                self._kept.move_to_end(text)
            out.append(new[text] if text in new else self._kept[text])
        for text, feature in new.items():
            self._kept[text] = feature
            self._bytes += feature.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return out

    @torch.no_grad()
    def _compute(self, texts: Sequence[Text]) -> list[Tensor]:
        """Run the layers below on texts that each begin at position 0; [T, D] each, on the CPU."""
        length = max(map(len, texts))
        padded = [[*text, *([0] * (length - len(text)))] for text in texts]  # after a text, so never attended to
        decoder = self._model.get_decoder()
        ids = torch.tensor(padded, device=self._model.device)
        (reached,) = inputs_of([decoder.layers[self._lowest]], lambda: decoder(input_ids=ids, use_cache=False))
        # Copies: a slice would keep the whole batch alive.
        return [row[: len(text)].cpu().clone() for row, text in zip(reached, texts, strict=True)]

    @contextmanager
    def in_place_of_layers(self, features: Tensor) -> Iterator[None]:
        """While active, a call of the model with N x T tokens starts at layer `lowest`, with these features [N, T, D].

        A cache of keys and values gets entries of size 1 for layer 0, by which it tells how long it is.
        """
        below = list(self._model.get_decoder().layers[: self._lowest])
        last = below[-1]

        def skip(layer: nn.Module, number: int) -> Any:
            def forward(hidden_states: Tensor, *_: Any, **options: Any) -> Tensor:
                cache = options.get("cache", options.get("past_key_values"))  # new and old name of transformers
                if number == 0 and cache is not None:
                    stub = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
                    cache.update(stub, stub, 0)
                return features if layer is last else hidden_states

            return forward

        for number, layer in enumerate(below):
            layer.forward = skip(layer, number)
        try:
            yield
        finally:
            for layer in below:
                del layer.forward
