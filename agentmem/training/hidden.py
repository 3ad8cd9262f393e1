"""The bare model's hidden states, run once, for what is learned from them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from agentmem.delta.attach import ProjectionSite
from agentmem.delta.model import SteeredModel
from agentmem.errors import UnsupportedModelError


class _ReachedError(Exception):
    """Ends a call of the model: what it would make of the rest is of no interest."""


def inputs_of(modules: Sequence[nn.Module], call: Callable[[], object]) -> list[Tensor]:
    """What each of some modules is given in a call of the model, which ends at the last of them.

    Args:
        modules: in the order in which they run.
        call: calls the model.
    """
    inputs: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0])
        if len(inputs) == len(modules):
            raise _ReachedError

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        with suppress(_ReachedError):
            call()
    finally:
        for handle in handles:
            handle.remove()
    return inputs


@torch.no_grad()
def hidden_states(
    steered: SteeredModel, rows: Sequence[Sequence[int]], pad: int, *, last: bool = False, at_once: int = 32
) -> Iterator[tuple[int, Tensor]]:
    """The inputs of the attention of every layer with memory, for rows of tokens that each begin at position 0.

    Args:
        steered: the model, whose memory plays no part.
        rows: token ids.
        pad: the token id of padding.
        last: add what enters the last norm, as if it were one more layer.
        at_once: how many rows run through the model together.

    Yields:
        For each row its number and [L, T, D], on the CPU and in the model's dtype; shorter rows first.

    Raises:
        UnsupportedModelError: `last`, and the model's decoder does not end in a norm.
    """
    decoder = steered.model.get_decoder()
    first: dict[int, ProjectionSite] = {}
    for site in steered.sites:
        if not site.is_output:
            # One projection of each layer sees the hidden states that the memory sees.
            first.setdefault(site.layer, site)
    modules = [site.module for site in first.values()]
    if last:
        modules.append(last_norm(steered))
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # little padding
    for begin in range(0, len(order), at_once):
        chosen = order[begin : begin + at_once]
        length = max(len(rows[n]) for n in chosen)
        ids = torch.tensor([[*rows[n], *([pad] * (length - len(rows[n])))] for n in chosen])
        ids = ids.to(steered.model.device)
        inputs = torch.stack(
            [part.cpu() for part in inputs_of(modules, lambda ids=ids: decoder(input_ids=ids, use_cache=False))]  # type: ignore[misc]
        )
        for place, n in enumerate(chosen):
            yield n, inputs[:, place, : len(rows[n])]


def last_norm(steered: SteeredModel) -> nn.Module:
    """The norm that a model's decoder ends in.

    Raises:
        UnsupportedModelError: there is none.
    """
    norm = getattr(steered.model.get_decoder(), "norm", None)
    if not isinstance(norm, nn.Module):
        raise UnsupportedModelError(
            f"expected a model whose decoder ends in a norm; found {type(steered.model).__name__} without one"
        )
    return norm
