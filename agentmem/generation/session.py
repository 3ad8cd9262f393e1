"""One session on the model while a turn runs: a KV cache, a state, the sums of an open pass.

Feeds tokens in chunks and yields between them, so that the worker can serve others. The memory's whole truth goes in as
a tensor and comes out as one; the session is thrown away with the turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agentmem.delta.fingerprint import model_fingerprint
from agentmem.delta.model import SteeredModel
from agentmem.delta.passes import Pending
from agentmem.errors import MissingAdapterError
from agentmem.generation.batch import Decoding, Want
from agentmem.generation.batch_cache import Seat
from agentmem.generation.carry import CarriedCache
from agentmem.generation.guided import Grammars
from agentmem.generation.kv_cache import PrefixCache, crop
from agentmem.generation.output_parser import Tags
from agentmem.generation.sampling import Sampler
from agentmem.generation.scheduler import Steps
from agentmem.prompt.transcript import Transcript
from agentmem.record import ConsumedRecord
from agentmem.state import MemoryState

CHUNK = 1024
"""Most tokens in one forward pass. A constant, so that a prompt is always cut at the same places."""
_FEW = 8  # tokens that a session reads beside others, rather than to copy its KV out of the row for one pass


class Runtime:
    """What all sessions of an engine share; nothing of any session.

    Attributes:
        model, tokenizer: as loaded.
        steered: the model with its memory attached, or None.
        transcript: the chat template.
        prefix: recent prefills.
        carried: what turns with ``kv="carry"`` left.
        limit: the longest context that the model takes.
        end_ids: tokens that end a reply.
        tags: delimiters of reasoning and tool calls.
        grammars: holds replies to a format.
        decoding: reads single tokens of many sessions at once.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        steered: SteeredModel | None,
        kv_cache_tokens: int,
        max_batch: int,
        template_options: Mapping[str, Any] | None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.steered = steered
        # Whether memory is written when a pass closes, instead of by every token.
        self.gathers = steered is not None and steered.config.write_strategy != "token"
        self.transcript = Transcript(tokenizer, template_options)
        self.kv_cache_tokens = kv_cache_tokens
        self.prefix = PrefixCache(kv_cache_tokens)
        self.carried = CarriedCache(kv_cache_tokens)
        self.limit: int = model.config.get_text_config().max_position_embeddings
        self.end_ids = _end_ids(model, tokenizer)
        self.tags = Tags.of(tokenizer)
        self.grammars = Grammars(tokenizer, self.tags, self.end_ids, model.config.get_text_config().vocab_size)
        self.decoding = Decoding(self, max_batch)
        self.model_fingerprint = model_fingerprint(model)
        self.adapter_fingerprint = steered.adapter_fingerprint if steered is not None else ""

    def zero_state(self) -> MemoryState:
        """The memory of a session that has consumed nothing."""
        if self.steered is None:
            raise MissingAdapterError("this engine has no adapter and so no memory; load one with adapter=")
        return MemoryState.zeros(self.steered.state_shape, self.model_fingerprint, self.adapter_fingerprint)

    def to_tensor(self, state: MemoryState) -> Tensor:
        """[1, L, H, r, r] on the model's device.

        Raises:
            StateMismatchError: another model's or adapter's state.
        """
        if self.steered is None:
            raise MissingAdapterError("this engine has no adapter and takes no state; load one with adapter=")
        state.require(self.model_fingerprint, self.adapter_fingerprint, self.steered.state_shape)
        return torch.tensor(state.matrices).unsqueeze(0).to(self.device)

    def to_state(self, tensor: Tensor, record: ConsumedRecord) -> Steps[MemoryState]:
        """The value that a turn returns; the one place where a state leaves the device."""
        matrices = yield from _to_host(tensor[0])
        return MemoryState.from_matrices(
            matrices.numpy(),
            record,
            model_fingerprint=self.model_fingerprint,
            adapter_fingerprint=self.adapter_fingerprint,
        )


@dataclass(frozen=True)
class Snapshot:
    """Where a session stands, apart from its KV. Tensors are never changed in place, so this copies nothing."""

    length: int
    state: Tensor | None
    pending: Pending | None


class Session:
    """One session. ``state`` None runs the bare model."""

    def __init__(self, runtime: Runtime, state: Tensor | None) -> None:
        self._runtime = runtime
        self.state = state
        self.pending: Pending | None = None
        self.cache: Any = None
        self.logits: Tensor | None = None
        self.sampler: Sampler | None = None  # who will be asked for the next token, and of the logits as they are
        self.chosen: int | None = None  # that token, where it is known already
        self.seat: Seat | None = None  # while it decodes beside others
        self.torn = False  # a pass failed: its layers may hold different tokens
        self.fresh_cache()

    @property
    def length(self) -> int:
        """Tokens in the KV cache, or in the seat."""
        if self.seat is not None:
            return self.seat.length
        return int(self.cache.get_seq_length())

    def fresh_cache(self) -> None:
        """Start at position 0 again; the state stays."""
        from transformers import DynamicCache

        self.stop_sharing()
        # Without the model's config every layer keeps all its KV, sliding ones too, so that it can be cut back.
        self.cache = DynamicCache()

    def snapshot(self) -> Snapshot:
        """To come back to with ``rewind``."""
        return Snapshot(self.length, self.state, self.pending)

    def rewind(self, to: Snapshot) -> None:
        """Go back to an earlier place of the same pass."""
        self._runtime.decoding.leave(self, keep=True)
        crop(self.cache, to.length)
        self.state, self.pending = to.state, to.pending

    def feed(
        self,
        ids: Sequence[int],
        segments: Sequence[int],
        *,
        logits: bool = False,
        close: bool = True,
    ) -> Steps[None]:
        """Read tokens, and write those whose segment is not -1; yields after each forward pass.

        In passes of this session alone; but a few tokens that close a reply go along with those of others.

        Args:
            ids: the tokens; nothing happens for none.
            segments: one number a token; token adapters only look at the sign.
            logits: keep those of the last token in ``self.logits`` ([V]).
            close: for message and sentence adapters, whether the pass ends here.
        """
        closes = close and self._runtime.gathers and self.state is not None
        if self.seat is not None and len(ids) <= _FEW and not logits and not closes:
            # Also when the others have left meanwhile: who joins the queue of those who begin waits for all of them.
            for token, segment in zip(ids, segments, strict=True):
                yield Want(self._runtime.decoding, self, token, segment)
            return
        self._runtime.decoding.leave(self, keep=True)
        for start in range(0, len(ids), CHUNK):
            stop = min(start + CHUNK, len(ids))
            last = stop == len(ids)
            self.forward(ids[start:stop], segments[start:stop], logits=logits and last, close=close and last)
            yield None

    def read(self, tokens: Sequence[int], segment: int) -> Steps[None]:
        """Read tokens of a reply; the logits behind them are kept, the pass stays open.

        One token is read together with those of other sessions; several in a pass of their own, but for a session that
        sits beside others: to stand up and sit down again costs more than to go along with them token by token.
        """
        if len(tokens) > 1 and self.seat is None:
            yield from self.feed(tokens, [segment] * len(tokens), logits=True, close=False)
            return
        for token in tokens:
            yield Want(self._runtime.decoding, self, token, segment)

    def stand_up(self) -> bool:
        """Give up the seat beside others and take along what was read there; says whether there was room for it.

        Where there was none, the cache is of no use any more.
        """
        try:
            self._runtime.decoding.leave(self, keep=True)
        except torch.OutOfMemoryError:
            self.torn = True
        return not self.torn

    def stop_sharing(self) -> None:
        """Give up the seat beside others; what was read there is forgotten."""
        self._runtime.decoding.leave(self, keep=False)

    def forward(self, ids: Sequence[int], segments: Sequence[int], *, logits: bool, close: bool) -> None:
        """One forward pass of this session alone; see ``feed``."""
        try:
            self._forward(ids, segments, logits=logits, close=close)
        except torch.OutOfMemoryError:
            self._runtime.decoding.release()  # what is kept for later: the next one may find room
            raise

    def _forward(self, ids: Sequence[int], segments: Sequence[int], *, logits: bool, close: bool) -> None:
        runtime = self._runtime
        self.chosen = None
        tokens = _on(runtime.device, ids)
        if self.state is None:
            inputs = {"input_ids": tokens, "cache": self.cache, "use_cache": True}
            if logits:
                self.logits = runtime.model(**inputs, logits_to_keep=1).logits[0, -1]
            else:
                runtime.model.get_decoder()(**inputs)
            return
        assert runtime.steered is not None
        writing = any(segment >= 0 for segment in segments)
        # Where all tokens write, a token adapter needs no numbers.
        counts = writing and (runtime.gathers or any(one < 0 for one in segments))
        out = runtime.steered(
            tokens,
            self.state,
            segments=_on(runtime.device, segments) if counts else None,
            write=writing,
            cache=self.cache,
            logits_to_keep=1 if logits else -1,
            pending=self.pending,
            close=close,
        )
        self.state, self.pending = out.state, out.pending
        if out.logits is not None:
            self.logits = out.logits[0, -1]


def _on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """[1, n] on the device; on CUDA without waiting for what it does at the moment."""
    return torch.tensor([numbers]).to(device, non_blocking=device.type == "cuda")


def _to_host(tensor: Tensor) -> Steps[Tensor]:
    """A copy on the CPU. From a GPU it goes while others are served."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(tensor.device))
    yield None
    arrived.synchronize()
    return host


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    named = [getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id]
    found = {i for n in named if n is not None for i in (n if isinstance(n, list) else [n])}
    return frozenset(found)
