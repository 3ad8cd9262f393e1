"""Attention in which the turns of a row do not see each other, at the cost of computing each turn separately.

A row of several turns under a dense mask costs the square of its length. Here the tokens of every block are laid out as
rows of their own, attend causally, and are put back. This is an attention function of transformers
(`AttentionInterface`), selected while `attending_apart` is active, so the model and its hooks see the rows unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from agentmem.errors import UnsupportedModelError

NAME = "agentmem_blocks"
_STEP = 16  # all blocks up to this length go into one group


@dataclass(frozen=True)
class _Layout:
    """The positions of the B * T tokens when blocks of similar length are laid side by side.

    `taken` holds for each such group [N, L] the tokens of its blocks (shorter blocks repeat their last token); `back`
    [B * T] holds the position of each token among all tokens of the groups.
    """

    taken: tuple[Tensor, ...]
    back: Tensor

    @classmethod
    def of(cls, blocks: Tensor) -> _Layout:
        """`blocks` [B, T] int64; a block is a run of equal numbers in a row."""
        count = blocks.numel()
        begins = torch.ones_like(blocks, dtype=torch.bool)
        begins[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
        first = begins.flatten().nonzero().squeeze(-1)
        lengths = torch.diff(first, append=torch.tensor([count]))
        taken, back, used = [], torch.empty(count, dtype=torch.int64), 0
        size = (lengths / _STEP).ceil().log2().ceil().long()  # the longest in a group is at most twice the shortest
        for group in sorted(set(size.tolist())):
            inside = (size == group).nonzero().squeeze(-1)
            longest = int(lengths[inside].max())
            place = torch.arange(longest).expand(len(inside), longest)
            real = place < lengths[inside, None]
            tokens = first[inside, None] + place.minimum(lengths[inside, None] - 1)
            back[tokens[real]] = used + torch.arange(tokens.numel()).view(tokens.shape)[real]
            used += tokens.numel()
            taken.append(tokens)
        return cls(tuple(taken), back)


_layout: ContextVar[_Layout] = ContextVar("layout")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within blocks: query [B, H, T, D], key and value [B, G, T, D]; returns [B, T, H, D]. Takes no mask."""
    layout = _layout.get()
    longest = max(taken.shape[1] for taken in layout.taken)
    if softcap is not None or s_aux is not None or (sliding_window is not None and sliding_window < longest):
        raise UnsupportedModelError(
            f"training needs plain causal attention; this model's has a window of {sliding_window} tokens (turns here "
            f"have {longest}), capped scores or sinks; train on shorter turns, or another model"
        )
    batch, heads, length, size = query.shape

    flat = [x.transpose(1, 2).reshape(batch * length, -1) for x in (query, key, value)]
    outs = []
    for taken in layout.taken:
        # The repeated tokens come after a block's last one, so causal attention never sees them from within the block.
        q, k, v = (x.index_select(0, taken.flatten()).view(*taken.shape, -1, size).transpose(1, 2) for x in flat)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=heads != key.shape[1]
        )
        outs.append(out.transpose(1, 2).reshape(-1, heads * size))
    return torch.cat(outs).index_select(0, layout.back).view(batch, length, heads, size), None


AttentionInterface.register(NAME, _attend)


@contextmanager
def attending_apart(model: PreTrainedModel, blocks: Tensor) -> Iterator[None]:
    """Let each token of [B, T] attend only to earlier tokens of its own run of equal `blocks` [B, T].

    No mask may be passed meanwhile: padding is a separate block at the end of a row.

    Raises:
        UnsupportedModelError: raised by the model's call, if its attention is not plainly causal.
    """
    implementation = model.config._attn_implementation
    token = _layout.set(_Layout.of(blocks))
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        _layout.reset(token)
