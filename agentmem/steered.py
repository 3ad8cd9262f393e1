"""The core call: a frozen causal language model whose attention is steered by a state that goes in and out.

``(state, tokens) -> (state', logits)``. Modules hold parameters and hooks, never a session: the state, the KV
cache and the sums of an open pass go in and come out. Outside a steered call the model is the bare model. One
call at a time: the hooks find the running pass on this object (``engine`` gives it a thread of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agentmem.adapter import Adapter, collect, fill, load_adapter, save_adapter
from agentmem.attach import AttentionSite, find_sites
from agentmem.config import DeltaHead, MemoryConfig
from agentmem.errors import AdapterError, ConfigError, SegmentsRequiredError, StateMismatchError, TurnError
from agentmem.fingerprint import model_fingerprint
from agentmem.kernels import runs_triton
from agentmem.passes import Pass, Pending, Place, SegmentPass, Through, TokenPass
from agentmem.pooled import BatchPass
from agentmem.steering import LayerMemory
from agentmem.stepping import GatherPass, Stack, StepPass

__all__ = ["Pending", "SteeredModel", "SteeredOutput"]


@dataclass(frozen=True)
class SteeredOutput:
    """What one call returns.

    Attributes:
        logits: [B, n, V], n as ``logits_to_keep`` asked; None where it asked for none.
        state: [B, L, H, r, r] float32, L the layers with memory in depth order.
        cache: the KV cache, or None where none was kept.
        pending: sums of an open message or sentence pass, for the next call; None where nothing is open.
    """

    logits: Tensor | None
    state: Tensor
    cache: Any
    pending: Pending | None


class SteeredModel:
    """A causal language model with memory attached; make one with ``SteeredModel.attach``."""

    def __init__(
        self,
        model: Any,
        config: MemoryConfig,
        sites: Sequence[AttentionSite],
        memory: Sequence[LayerMemory],
        source: str | None,
    ) -> None:
        self.model = model
        self.config = config
        self.layers = [site.layer for site in sites]
        self.memory = nn.ModuleList(memory)
        self._memory = tuple(memory)
        self._source = source
        self._as_loaded = "" if source is None else collect(memory, self.layers, config).fingerprint
        self._through: Through | None = None
        self._places: list[Place] = []
        self._stack = Stack(self._memory)
        self._handles = [handle for index, site in enumerate(sites) for handle in self._install(index, site)]

    @classmethod
    def attach(
        cls,
        model: Any,
        *,
        adapter: str | Path | Adapter | None = None,
        config: MemoryConfig | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> SteeredModel:
        """Attach memory to a causal language model of transformers.

        Args:
            model: the model; its weights are not changed and stay trainable or frozen as they are.
            adapter: an adapter directory, or one already loaded.
            config: instead of an adapter, a mechanism with fresh weights (to train).
            dtype: of the memory's parameters; None = the model's.
            seed: for fresh weights.

        Raises:
            UnsupportedModelError: the attention cannot be steered.
            AdapterError, ConfigError: the adapter does not fit, was made for another model, or both or neither were
                given.
        """
        loaded: Adapter | None = None
        if adapter is not None and config is None:
            loaded = load_adapter(adapter) if isinstance(adapter, str | Path) else adapter
            config = loaded.config
        elif config is None or adapter is not None:
            raise ConfigError("give either adapter= (trained weights) or config= (fresh weights to train)")
        sites = _targeted(find_sites(model), config)
        _need_weights(model)
        _need_base(loaded, model)
        memory = [LayerMemory(config, site.hidden, site.widths) for site in sites]
        generator = torch.Generator().manual_seed(seed)
        for site, module in zip(sites, memory, strict=True):
            if loaded is None:
                base = None
                if config.output_init != "zero":
                    base = {head: site.base_weight(head).float().cpu() for head in site.targets}
                module.reset_parameters(base, generator)
            module.to(device=_device(site.first), dtype=dtype or model.dtype)
        if loaded is not None:
            fill(memory, [site.layer for site in sites], loaded)
        return cls(model, config, sites, memory, loaded.fingerprint if loaded is not None else None)

    def detach(self) -> Any:
        """Remove every hook and return the bare model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.model

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """(L, H, r, r) of one session."""
        return (len(self.layers), self.config.num_state_heads, self.config.rank, self.config.rank)

    @property
    def adapter(self) -> Adapter:
        """The adapter as it stands now (copies), bound to the model that it steers."""
        now = collect(self._memory, self.layers, self.config)
        return replace(now, base=model_fingerprint(self.model))

    @property
    def adapter_fingerprint(self) -> str:
        """Of the adapter as it was loaded, whatever dtype and device it runs in here.

        Of the weights as they stand now where they are fresh or were trained since.
        """
        now = collect(self._memory, self.layers, self.config).fingerprint
        return now if self._source is None or now != self._as_loaded else self._source

    def save(self, directory: str | Path) -> None:
        """Save the adapter (safetensors and json)."""
        save_adapter(directory, self.adapter)

    def zeros(self, batch: int = 1) -> Tensor:
        """The empty state of ``batch`` sessions."""
        return torch.zeros(batch, *self.state_shape, device=_device(self.memory))

    def __call__(
        self,
        input_ids: Tensor,
        state: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segments: Tensor | None = None,
        write: bool | Tensor = True,
        cache: Any = None,
        logits_to_keep: int = 0,
        pending: Pending | None = None,
        close: bool = True,
        attention_bias: Tensor | None = None,
    ) -> SteeredOutput:
        """Read tokens, steered by the state, and write them into it.

        Args:
            input_ids: [B, T].
            state: [B, L, H, r, r] float32; None = zeros. Never changed.
            attention_mask: [B, P + T] of 0 and 1, P the tokens already in the cache; its last T columns also
                keep padding from being written. None = no padding.
            position_ids: [B, T]; None = the cumulative sum of the mask, minus 1.
            segments: [B, T] int64, -1 = never written (under every strategy); message and sentence adapters
                need them to write.
            write: whether tokens write, for all or for each [B, T]. One that does not counts as segment -1.
            cache: None = keep no KV, True = a new DynamicCache, or a cache, which is extended in place.
            logits_to_keep: 0 = all positions, n = the last n, -1 = none.
            pending: sums of the same pass so far, from the call before.
            close: False leaves a message or sentence pass open: nothing is written yet.
            attention_bias: [B, 1, T, P + T] bool, True = may attend, given to the attention in place of the
                mask (which then only gates writes). For training on several turns in one call.

        Raises:
            SegmentsRequiredError: a message or sentence adapter is to write and has no segments.
            StateMismatchError: the state has another shape or dtype.
            TurnError: another argument has the wrong shape; ``pending`` is of another batch or given to a
                token adapter; called while another call is running, or after ``detach``.
        """
        if self._through is not None or not self._handles:
            raise TurnError("this steered model is detached, or busy with another call; one call at a time")
        batch, length = input_ids.shape
        state = self._checked(state, batch)
        if cache is True:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.model.config)
        past = int(cache.get_seq_length()) if cache is not None else 0
        _need_shape("attention_mask", attention_mask, (batch, past + length))
        _need_shape("attention_bias", attention_bias, (batch, 1, length, past + length))
        _need_shape("position_ids", position_ids, (batch, length))
        _need_shape("segments", segments, (batch, length))
        _need_shape("write", write if isinstance(write, Tensor) else None, (batch, length))
        self._check_pending(pending, batch)
        if position_ids is None:
            position_ids = _positions(attention_mask, past, length, input_ids)
        begun = self._begin(state, attention_mask, segments, write, pending, length)
        self._through = begun.through
        try:
            logits = self._forward(
                input_ids,
                attention_mask=attention_mask if attention_bias is None else mask_for(self.model, attention_bias),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=logits_to_keep,
            )
            new_state, still_open = begun.end(close)
        finally:
            self._through = None
        return SteeredOutput(logits, new_state, cache, still_open)

    def _forward(self, input_ids: Tensor, *, logits_to_keep: int, **inputs: Any) -> Tensor | None:
        if logits_to_keep < 0:
            self.model.get_decoder()(input_ids=input_ids, **inputs)
            return None
        logits: Tensor = self.model(input_ids=input_ids, logits_to_keep=logits_to_keep, **inputs).logits
        return logits

    def _begin(
        self,
        state: Tensor,
        attention_mask: Tensor | None,
        segments: Tensor | None,
        write: bool | Tensor,
        pending: Pending | None,
        length: int,
    ) -> Pass:
        by_segment = self.config.write_strategy != "token"
        mask = attention_mask[:, -length:].bool() if attention_mask is not None else None
        writing = write is not False
        if isinstance(write, Tensor):
            # Of single tokens the mask says enough, and nothing waits for the device.
            writing = (length == 1 and not by_segment) or bool(write.any())
            mask = write.bool() if mask is None else mask & write.bool()
        ready = self._stack.ready(state.device) if length == 1 and not torch.is_grad_enabled() else None
        if not by_segment:
            if segments is not None:
                mask = segments >= 0 if mask is None else mask & (segments >= 0)
            if ready is not None and runs_triton(state.device):
                return BatchPass(self._memory, state, mask, writing)
            if ready is not None:
                return StepPass(self._memory, ready, state, mask, writing)
            return TokenPass(self._memory, state, mask, writing)
        if writing and segments is None:
            raise SegmentsRequiredError(
                f"this adapter writes by {self.config.write_strategy}: pass segments= with the segment of "
                "each token (-1 = never written), or write=False to only read"
            )
        if segments is not None and mask is not None:
            segments = torch.where(mask, segments, -1)
        segments = segments if writing else None
        if ready is not None:
            return GatherPass(self._memory, ready, state, segments, pending)
        return SegmentPass(self._memory, state, segments, pending)

    def _install(self, index: int, site: AttentionSite) -> list[Any]:
        by_module: dict[nn.Module, list[tuple[DeltaHead, int]]] = {site.first: []}
        for head in self.config.delta_heads:
            target, start = site.targets[head]
            by_module.setdefault(target, []).append((head, start))
        last = site.targets["o"][0]
        by_module.setdefault(last, [])

        def hook_for(place: Place) -> Callable[..., Tensor | None]:
            def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
                through = self._through
                return None if through is None else through(place, inputs[0], output)

            return hook

        first = len(self._places)
        self._places += [
            Place(first + number, index, tuple(heads), target is last)
            for number, (target, heads) in enumerate(by_module.items())
        ]
        return [
            target.register_forward_hook(hook_for(place))
            for target, place in zip(by_module, self._places[first:], strict=True)
        ]

    def _checked(self, state: Tensor | None, batch: int) -> Tensor:
        if state is None:
            return self.zeros(batch)
        expected = (batch, *self.state_shape)
        if tuple(state.shape) != expected or state.dtype != torch.float32:
            raise StateMismatchError(
                f"expected a float32 state of shape {list(expected)} for this model, adapter and batch; "
                f"found {state.dtype} {list(state.shape)}"
            )
        return state

    def _check_pending(self, pending: Pending | None, batch: int) -> None:
        if pending is None:
            return
        if self.config.write_strategy == "token":
            raise TurnError("pending= belongs to message and sentence adapters; this one writes by token")
        found = (pending.counts.shape[0], len(pending.sums))
        if found != (batch, len(self.layers)):
            raise TurnError(
                f"pending must be of {batch} rows and {len(self.layers)} layers; found {found[0]} and {found[1]}"
            )


def mask_for(model: Any, allowed: Tensor) -> Tensor:
    """A boolean 4-D mask in the form that the model's attention takes."""
    if model.config._attn_implementation != "eager":
        return allowed
    zero = torch.zeros((), dtype=model.dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(model.dtype).min)


def _need_weights(model: Any) -> None:
    """Refuse a model some of whose weights lie on no device: accelerate fetches them only when a layer runs."""
    absent = next((name for name, one in model.named_parameters() if one.is_meta), None)
    if absent is not None:
        raise ConfigError(
            f"the weights of this model must lie on a device, found {absent} offloaded; "
            "spread the model over more devices, quantise it (quantize='4bit'), or use a smaller one"
        )


def _need_base(adapter: Adapter | None, model: Any) -> None:
    """Refuse an adapter that says it was made for another model: it would fit by shape, and steer at random."""
    if adapter is not None and adapter.base is not None and adapter.base != (found := model_fingerprint(model)):
        raise AdapterError(
            f"the adapter was made for the model of fingerprint {adapter.base}, this model's is {found}; "
            "load the model that it was trained on, or an adapter that was trained for this one"
        )


def _need_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise TurnError(f"{name} must have shape {list(shape)}; found {list(tensor.shape)}")


def _targeted(sites: list[AttentionSite], config: MemoryConfig) -> list[AttentionSite]:
    if not config.target_layers:
        return sites
    by_number = {site.layer: site for site in sites}
    absent = sorted(set(config.target_layers) - by_number.keys())
    if absent:
        raise AdapterError(
            f"the adapter targets layers {absent}, which this model has not; its attention layers are "
            f"{sorted(by_number)}"
        )
    return [by_number[n] for n in sorted(config.target_layers)]


def _positions(mask: Tensor | None, past: int, length: int, like: Tensor) -> Tensor:
    if mask is None:
        return torch.arange(past, past + length, device=like.device).expand(like.shape)
    return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
