"""The core call: a frozen causal language model whose attention is corrected from a memory state.

`(state, tokens) -> (state', logits)`. Modules hold parameters, never a session: the state, the KV cache and the sums of
an open pass are arguments and results. While a call runs, the forward methods of the corrected projections are
replaced; outside of a call the model is the bare model. Only one call may run at a time, since two would replace the
same methods (`engine` runs all calls on one thread).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from agentmem.delta.adapter import Adapter, collect, fill, load_adapter, need_base, save_adapter
from agentmem.delta.attach import AttentionSite, ProjectionSite, find_sites, need_weights, projection_sites, targeted
from agentmem.delta.config import MemoryConfig
from agentmem.delta.decode import DecodeStep, PackedWeights, TorchDecodeStep
from agentmem.delta.decode_pool import PooledDecodeStep
from agentmem.delta.fingerprint import model_fingerprint
from agentmem.delta.layer import LayerMemory
from agentmem.delta.passes import AllRead, ForwardContext, Pending, SegmentPass, TokenPass
from agentmem.delta.published import check_base
from agentmem.errors import ConfigError, SegmentsRequiredError, StateMismatchError, TurnError

__all__ = ["Pending", "SteeredModel", "SteeredOutput"]


@dataclass(frozen=True)
class SteeredOutput:
    """What one call returns.

    Attributes:
        logits: [B, n, V], where n follows from `logits_to_keep`; None where no logits were wanted.
        state: [B, L, H, r, r] float32, where L counts the layers with memory, in depth order.
        cache: the KV cache, or None where none was kept.
        pending: sums of an open message or sentence pass, for the next call; None where no pass is open.
        reads: what each layer with memory has read, [B, T, H, r] float32, in depth order; None where they were not to
            be kept.
    """

    logits: Tensor | None
    state: Tensor
    cache: Any
    pending: Pending | None
    reads: tuple[Tensor, ...] | None = None


class _Use:
    """Whether a call with memory is running on a model: all memories of one model replace the same methods."""

    running = False


_USES: WeakKeyDictionary[nn.Module, _Use] = WeakKeyDictionary()


class SteeredModel:
    """A causal language model with memory attached; make one with `SteeredModel.attach`."""

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
        self._sites = projection_sites(sites, config.delta_heads)
        self._source = source
        self._as_loaded = "" if source is None else collect(memory, self.layers, config).fingerprint
        self._attached = True
        self._use = _USES.setdefault(model, _Use())
        self._weights: PackedWeights | None = None
        # One for writing or gathering and one for reading only; each for as many rows as the last call of its kind had.
        self._steps: dict[bool, DecodeStep] = {}

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
            model: the model. Its weights are not changed and stay trainable or frozen as they are.
            adapter: an adapter directory, or a loaded adapter.
            config: in place of an adapter: options, with newly initialised weights (for training).
            dtype: dtype of the memory's parameters; None = the model's.
            seed: seed of the newly initialised weights.

        Raises:
            UnsupportedModelError: the attention cannot be steered.
            AdapterError, ConfigError: the adapter does not fit, was made for another model, or both or neither were
                given. A directory that does not say which model it was made for, or names another one than a
                model that was loaded from a directory, is only a `MemoryWarning`.
        """
        loaded: Adapter | None = None
        if adapter is not None and config is None:
            loaded = load_adapter(adapter) if isinstance(adapter, str | Path) else adapter
            if loaded.base is None and not isinstance(adapter, Adapter):
                check_base(getattr(model.config, "name_or_path", ""), Path(adapter), str(adapter))
            config = loaded.config
        elif config is None or adapter is not None:
            raise ConfigError("give either adapter= (trained weights) or config= (fresh weights to train)")
        sites = targeted(find_sites(model), config)
        need_weights(model)
        need_base(loaded, model)
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
        """Remove the memory and return the bare model."""
        self._attached, self._weights, self._steps = False, None, {}
        return self.model

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a steered model is not copied or pickled, since it works in the modules of its model; copy the model, "
            "which gives a bare one: SteeredModel.attach(copy.deepcopy(steered.model), adapter=steered.adapter)"
        )

    @property
    def sites(self) -> tuple[ProjectionSite, ...]:
        """The projections that are corrected, or whose input the memory reads, in the order in which they run."""
        return tuple(self._sites)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """(L, H, r, r) of one session."""
        return (len(self.layers), self.config.num_state_heads, self.config.rank, self.config.rank)

    @property
    def adapter(self) -> Adapter:
        """The adapter with its present weights (copies), bound to the model that it is attached to."""
        now = collect(self._memory, self.layers, self.config)
        return replace(now, base=model_fingerprint(self.model))

    @property
    def adapter_fingerprint(self) -> str:
        """Fingerprint of the adapter as it was loaded, whatever its dtype and device are here.

        Where the weights are newly initialised or were trained since, the fingerprint of the present weights.
        """
        now = collect(self._memory, self.layers, self.config).fingerprint
        return now if self._source is None or now != self._as_loaded else self._source

    def save(self, directory: str | Path) -> None:
        """Save the adapter (safetensors and json)."""
        save_adapter(directory, self.adapter)

    def zeros(self, batch: int = 1) -> Tensor:
        """The empty state of `batch` sessions."""
        return torch.zeros(batch, *self.state_shape, dtype=torch.float32, device=_device(self.memory))

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
        first_order: bool = False,
        keep_reads: bool = False,
        steer: bool | Tensor = True,
    ) -> SteeredOutput:
        """Read tokens while the state corrects the attention, and write them into the state.

        Args:
            input_ids: [B, T].
            state: [B, L, H, r, r] float32; None = zeros. Never changed.
            attention_mask: [B, P + T] of 0 and 1, P the tokens already in the cache; its last T columns also
                keep padding from being written. None = no padding.
            position_ids: [B, T]; None = the cumulative sum of the mask, minus 1.
            segments: [B, T] int64, -1 = never written (under every write strategy). Message and sentence adapters
                need segments to write.
            write: whether tokens write: one bool, or a bool for each of [B, T]. A token that does not write counts
                as segment -1.
            cache: None = keep no KV, True = make a new DynamicCache, or an existing cache, which is extended in
                place.
            logits_to_keep: 0 = logits at all positions, n = at the last n, -1 = none.
            pending: sums so far of the same pass, from the previous call.
            close: False leaves a message or sentence pass open: nothing is written yet.
            attention_bias: [B, 1, T, P + T] bool, True = may attend. The attention gets it in place of
                `attention_mask`, which then only decides what is written. For training on several turns in one
                call.
            first_order: for training: run the model itself without gradients. They flow through what is written to
                the state, and through `reads`, but not through what corrections do to the hidden states of this call;
                the model's activations are not kept. The logits have no gradient then.
            keep_reads: whether to return what each layer has read.
            steer: whether tokens are corrected by what they read: one bool, a bool for each of [B, T], or by how much,
                [B, T] float32. Tokens that are not have the hidden states of the bare model, and write all the same.

        Raises:
            SegmentsRequiredError: a message or sentence adapter should write but has no segments.
            StateMismatchError: the state has the wrong shape or dtype.
            TurnError: another argument has the wrong shape; `pending` belongs to another batch or was passed to a
                token adapter; another call is running; or the memory was removed by `detach`.
        """
        self._need_idle()
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
        _need_shape("steer", steer if isinstance(steer, Tensor) else None, (batch, length))
        stepping = length == 1 and not keep_reads and steer is True and not torch.is_grad_enabled()
        context = self._context(state, attention_mask, segments, write, pending, length, stepping)
        mask = attention_mask if attention_bias is None else mask_for(self.model, attention_bias)
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        context.kept = {} if keep_reads else None
        context.steer = steer
        if first_order and torch.is_grad_enabled():
            context.first_order = True
            # Layers above the last one with memory have no part in what is written.
            context.stops = logits_to_keep < 0 and cache is None and not hasattr(self.model, "hf_device_map")
            with torch.no_grad():
                logits, after, open_sums = self._run(context, inputs, cache, logits_to_keep, close)
        else:
            logits, after, open_sums = self._run(context, inputs, cache, logits_to_keep, close)
        reads = None if context.kept is None else tuple(context.kept[layer] for layer in range(len(self._memory)))
        return SteeredOutput(logits, after, cache, open_sums, reads)

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        pool: Tensor,
        slots: Tensor,
        *,
        position_ids: Tensor,
        cache: Any,
        write: bool | Tensor = True,
        attention_bias: Tensor | None = None,
    ) -> Tensor:
        """Decode one token per row on a pool of states, which is changed in place. No gradients.

        For decode loops that are compiled: `torch.compile(fullgraph=True)` captures one graph and uses it again with
        other slots, states, tokens, positions and masks, as long as the cache keeps its shape (as a StaticCache of
        transformers does, for models without sliding windows). Compiled or not, the results are those of a call.

        Args:
            input_ids: [B, 1].
            pool: [slots, L, H, r, r] float32, contiguous, on the device of the memory, as made by `zeros(slots)`.
            slots: [B] int32 or int64, the slot of each row's state; each at most once and below the pool's length
                (not checked, since a check would wait for the device). -1 = an inert row, which is not corrected
                and writes no state.
            position_ids: [B, 1].
            cache: a cache of transformers, extended in place by one token in every row, inert rows included.
            write: whether tokens write: one bool, or [B, 1] bool. Message and sentence adapters can only read here.
            attention_bias: [B, 1, 1, W] bool, True = may attend, where W is the length that the cache shows; None =
                the model's own mask.

        Returns:
            The logits [B, V].

        Raises:
            SegmentsRequiredError: a message or sentence adapter should write.
            StateMismatchError: the pool has the wrong shape, dtype or device, or is not contiguous.
            TurnError: another argument has the wrong shape or dtype; another call is running; or the memory was
                removed by `detach`.

        If it fails inside the model, some layers have already read and written and others have not: pool and cache
        must then be discarded.
        """
        self._need_idle()
        if write is not False and self.config.write_strategy != "token":
            raise SegmentsRequiredError(
                f"this adapter writes by {self.config.write_strategy}, a step by token: pass write=False to only read"
            )
        context = PooledDecodeStep.in_place(self._memory, pool, slots, write)
        single = slots.shape[0], 1
        _need_shape("input_ids", input_ids, single)
        _need_shape("position_ids", position_ids, single)
        if attention_bias is not None:
            _need_shape("attention_bias", attention_bias, (*single, 1, attention_bias.shape[-1]))
            attention_bias = mask_for(self.model, attention_bias)
        inputs = {"input_ids": input_ids, "attention_mask": attention_bias, "position_ids": position_ids}
        logits, _, _ = self._run(context, inputs, cache, 1, True)
        assert logits is not None
        return logits[:, -1]

    def _need_idle(self) -> None:
        if not self._attached:
            raise TurnError("this steered model is detached, so its model has no memory; attach it again")
        if self._use.running:
            raise TurnError(
                "the model is busy with another call, of this memory or of another one attached to it; make one call "
                "at a time, or load the model twice"
            )

    def _run(
        self, context: ForwardContext, inputs: dict[str, Any], cache: Any, logits_to_keep: int, close: bool
    ) -> tuple[Tensor | None, Tensor, Pending | None]:
        """The logits, and what the context returns at its end.

        The forward methods are replaced, which has the effect of a hook. A real hook makes `nn.Module` take a longer
        path, whose code costs 20 microseconds to fetch after weights have gone through the caches: a hundredth of a
        token's time on 12 layers of 1,024. Hooks of other libraries see the corrected output, and a forward that
        another library has put there (accelerate, for example) is called and is put back afterwards.
        """
        inputs |= {"cache": cache, "use_cache": cache is not None}
        logits: Tensor | None = None
        own_forwards: list[Any] = []
        self._use.running = True
        try:
            context.begin()
            for site in self._sites:
                module = site.module
                own_forwards.append(module.__dict__.get("forward"))
                # Not through `nn.Module.__setattr__`, which takes longer than everything else here.
                module.__dict__["forward"] = partial(context.forward, site, module.forward)
            if context.stops:
                with suppress(AllRead):
                    self.model.get_decoder()(**inputs)
            elif logits_to_keep < 0:
                self.model.get_decoder()(**inputs)
            else:
                logits = self.model(logits_to_keep=logits_to_keep, **inputs).logits
            return logits, *context.end(close)
        finally:
            # In reverse order, in case two layers share a module.
            for site in reversed(self._sites[: len(own_forwards)]):
                own = own_forwards.pop()
                if own is None:
                    site.module.__dict__.pop("forward", None)
                else:
                    site.module.__dict__["forward"] = own
            self._use.running = False

    def _context(
        self,
        state: Tensor,
        attention_mask: Tensor | None,
        segments: Tensor | None,
        write: bool | Tensor,
        pending: Pending | None,
        length: int,
        stepping: bool,
    ) -> ForwardContext:
        """The context of the call: a decode step if `stepping` and the weights suit it, else a pass."""
        by_segment = self.config.write_strategy != "token"
        mask = attention_mask[:, -length:].bool() if attention_mask is not None else None  # [B, T]
        writing = write is not False
        if isinstance(write, Tensor):
            # For single tokens the mask alone is enough; no need to wait for the device.
            writing = (length == 1 and not by_segment) or bool(write.any())
            mask = write.bool() if mask is None else mask & write.bool()
        if not by_segment:
            if segments is not None:
                mask = segments >= 0 if mask is None else mask & (segments >= 0)
            weights = self._packed(state.device) if stepping else None
            if weights is None:
                return TokenPass(self._memory, state, mask, writing)
            if weights.uses_triton:
                return PooledDecodeStep.on_copy(self._memory, state, mask, writing)
            return self._step(weights, state, writing, mask)
        if writing and segments is None:
            raise SegmentsRequiredError(
                f"this adapter writes by {self.config.write_strategy}: pass segments= with the segment of "
                "each token (-1 = never written), or write=False to only read"
            )
        if segments is not None and mask is not None:
            segments = torch.where(mask, segments, -1)
        segments = segments if writing else None
        weights = self._packed(state.device) if stepping else None
        if weights is None:
            return SegmentPass(self._memory, state, segments, pending)
        ids: list[int] = [] if segments is None else segments.flatten().tolist()
        return self._step(weights, state, max(ids, default=-1) >= 0, None, ids, pending)

    def _packed(self, device: torch.device) -> PackedWeights | None:
        """The weights as decode steps need them; None where they are not all on `device`."""
        weights, addresses = self._weights, list[int]()
        if weights is not None:
            for module in self._memory:
                addresses += map(Tensor.data_ptr, weights.parameters_of(module._parameters))
        if weights is None or addresses != weights.addresses:
            weights = self._weights = PackedWeights(self._memory)
            self._steps = {}
        return weights if weights.device == device else None

    def _step(
        self,
        weights: PackedWeights,
        state: Tensor,
        writing: bool,
        mask: Tensor | None,
        segments: list[int] | None = None,
        pending: Pending | None = None,
    ) -> DecodeStep:
        """The decode step for as many rows as the state has, with its inputs set; it is kept for the next token."""
        step = self._steps.get(writing)
        if step is None or step.batch != state.shape[0]:
            form: type[DecodeStep] = TorchDecodeStep
            if weights.suit_numba():
                from agentmem.delta.decode_numba import NumbaDecodeStep as form
            step = self._steps[writing] = form(weights, state, writing)
        step.state, step.mask, step.segments, step.pending = state, mask, segments, pending
        return step

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
        rows, layers = pending.counts.shape[0], len(pending.sums)
        if (rows, layers) != (batch, len(self.layers)):
            raise TurnError(f"pending must be of {batch} rows and {len(self.layers)} layers; found {rows} and {layers}")


def mask_for(model: Any, allowed: Tensor) -> Tensor:
    """A boolean 4-D mask in the form that the model's attention implementation takes."""
    if model.config._attn_implementation != "eager":
        return allowed
    zero = torch.zeros((), dtype=model.dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(model.dtype).min)


def _need_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise TurnError(f"{name} must have shape {list(shape)}; found {list(tensor.shape)}")


def _positions(mask: Tensor | None, past: int, length: int, like: Tensor) -> Tensor:
    if mask is None:
        return torch.arange(past, past + length, device=like.device).expand(like.shape)
    return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
