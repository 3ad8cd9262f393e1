"""The model as generation uses it: tokens and a state in, logits and a state out. Knows nothing of batches or turns."""

from __future__ import annotations

from collections import abc
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agentmem.delta.config import WriteStrategy
from agentmem.delta.fingerprint import model_fingerprint
from agentmem.delta.model import SteeredModel, mask_for
from agentmem.delta.passes import Pending
from agentmem.errors import MissingAdapterError
from agentmem.generation.sequence import DecodeRequest, Sequence
from agentmem.record import ConsumedRecord
from agentmem.state import MemoryState


class ForwardOutput(NamedTuple):
    """The result of a forward pass: logits [B, V] of the last tokens where wanted, the state, and the open sums."""

    logits: Tensor | None
    state: Tensor | None
    pending: Pending | None


class ModelRunner:
    """A model with or without memory; also moves states to its device and back.

    Args:
        model: a causal language model of transformers.
        steered: the model with its memory attached, or None.

    Attributes:
        device: the device of tokens and states.
        strategy: the adapter's write strategy; None without an adapter.
        writes_at_close: whether memory is written when a pass closes, and not by every token.
        steers_replies_only: whether the memory corrects only the tokens that predict a reply.
        context_limit: the longest context that the model takes, in tokens.
    """

    def __init__(self, model: Any, steered: SteeredModel | None) -> None:
        self.model = model
        self.steered = steered
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.strategy: WriteStrategy | None = steered.config.write_strategy if steered is not None else None
        self.writes_at_close = self.strategy not in (None, "token")
        self.steers_replies_only = steered is not None and steered.config.steered_tokens == "reply"
        self.context_limit: int = model.config.get_text_config().max_position_embeddings
        self.model_fingerprint = model_fingerprint(model)
        self.adapter_fingerprint = steered.adapter_fingerprint if steered is not None else ""

    def forward(
        self,
        tokens: Tensor,
        state: Tensor | None,
        cache: Any,
        *,
        segments: Tensor | None = None,
        write: bool | Tensor = True,
        pending: Pending | None = None,
        close: bool = True,
        logits: bool = True,
        position_ids: Tensor | None = None,
        attention_bias: Tensor | None = None,
        steer: bool | Tensor = True,
    ) -> ForwardOutput:
        """One forward pass over tokens [B, T]; of the bare model where `state` is None.

        The arguments are those of `SteeredModel.__call__`; `logits`: whether the logits of the last tokens are wanted.
        """
        # A pass that neither writes nor is steered is one of the bare model, unless it closes what earlier ones opened.
        idle = steer is False and write is False and pending is None
        if state is not None and not idle:
            assert self.steered is not None
            out = self.steered(
                tokens,
                state,
                segments=segments,
                write=write,
                cache=cache,
                logits_to_keep=1 if logits else -1,
                pending=pending,
                close=close,
                position_ids=position_ids,
                attention_bias=attention_bias,
                steer=steer,
            )
            return ForwardOutput(None if out.logits is None else out.logits[:, -1], out.state, out.pending)
        inputs = {"input_ids": tokens, "cache": cache, "use_cache": True}
        if attention_bias is not None:
            inputs |= {"attention_mask": mask_for(self.model, attention_bias), "position_ids": position_ids}
        if not logits:
            self.model.get_decoder()(**inputs)
            return ForwardOutput(None, state, None)
        return ForwardOutput(self.model(**inputs, logits_to_keep=1).logits[:, -1], state, None)

    def extend(
        self,
        sequence: Sequence,
        ids: abc.Sequence[int],
        segments: abc.Sequence[int],
        *,
        logits: bool,
        close: bool,
        reply_from: int = 0,
    ) -> None:
        """Read tokens at the end of a sequence that has no row, in a pass of their own.

        Args:
            sequence: changed in place.
            ids: the tokens, at least one.
            segments: a segment for each token, -1 = not written; for token adapters only the sign matters.
            logits: whether to store the logits of the last token in `sequence.logits`.
            close: for message and sentence adapters, whether the pass ends here.
            reply_from: the first of the tokens that predict a reply; `len(ids)` if none does.
        """
        sequence.next_token = None
        steer: bool | Tensor = True
        if self.steers_replies_only and reply_from:
            steer = reply_from < len(ids) and self._to_device([int(n >= reply_from) for n in range(len(ids))]).bool()
        writes = max(segments) >= 0
        # Where all tokens write, a token adapter needs no segments.
        numbered = writes and (self.writes_at_close or min(segments) < 0)
        out = self.forward(
            self._to_device(ids),
            sequence.state,
            sequence.cache,
            segments=self._to_device(segments) if numbered else None,
            write=writes,
            pending=sequence.pending,
            close=close,
            logits=logits,
            steer=steer,
        )
        sequence.state, sequence.pending = out.state, out.pending
        if out.logits is not None:
            sequence.logits = out.logits[0]

    def decode(self, request: DecodeRequest) -> None:
        """Read the token of a request in a pass of its own, as `extend`; a failure is stored in the request."""
        try:
            self.extend(request.sequence, [request.token], [request.segment], logits=True, close=False)
        except Exception as error:  # noqa: BLE001 - the sequence's turn gets it
            request.sequence.cache_valid = False
            request.error = error

    def zero_state(self) -> MemoryState:
        """The memory of a session that has consumed nothing.

        Raises:
            MissingAdapterError: there is no adapter.
        """
        if self.steered is None:
            raise MissingAdapterError("this engine has no adapter and so no memory; load one with adapter=")
        return MemoryState.zeros(self.steered.state_shape, self.model_fingerprint, self.adapter_fingerprint)

    def require_fit(self, state: MemoryState) -> None:
        """Refuse a state that does not belong to this model and adapter.

        Raises:
            MissingAdapterError: there is no adapter.
            StateMismatchError: the state belongs to another model or adapter.
        """
        if self.steered is None:
            raise MissingAdapterError("this engine has no adapter and takes no state; load one with adapter=")
        state.require(self.model_fingerprint, self.adapter_fingerprint, self.steered.state_shape)

    def load_state(self, state: MemoryState) -> Tensor:
        """The state as a tensor [1, L, H, r, r] on the model's device."""
        return torch.tensor(state.matrices).unsqueeze(0).to(self.device)

    def save_state(self, state: Tensor, record: ConsumedRecord) -> abc.Generator[None, None, MemoryState]:
        """The value that a turn returns, from [1, L, H, r, r]; the only place where a state leaves the device.

        A generator: while a state is copied from a GPU, other turns can run.
        """
        host = state[0]
        if host.device.type == "cuda":
            host = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
            host.copy_(state[0], non_blocking=True)
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(state.device))
            yield None
            arrived.synchronize()
        return MemoryState.from_matrices(
            host.cpu().numpy(),
            record,
            model_fingerprint=self.model_fingerprint,
            adapter_fingerprint=self.adapter_fingerprint,
        )

    def _to_device(self, numbers: abc.Sequence[int]) -> Tensor:
        """A tensor [1, n]; on CUDA without waiting for the device's current work."""
        return torch.tensor([numbers]).to(self.device, non_blocking=self.device.type == "cuda")
