"""agentmem for lm-eval (EleutherAI's harness): the model class `agentmem`, and its command with that class known to it.

    python -m agentmem.evaluation.lm_eval_model run --model agentmem \\
        --model_args pretrained=smollm2,arm=zero --tasks ifeval --apply_chat_template

lm-eval's tasks have one prompt and no sessions, and are left as they are. So an arm (`arm=`) says what memory the
prompt is read with:

    bare     none: the model alone
    zero     one that is empty when the prompt begins, and is written as the prompt is read
    foreign  one that is full of other talk when the prompt begins: does a full memory do harm?

Decoding is greedy. Everything else is lm-eval's own class for Hugging Face models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor

from agentmem.delta.model import SteeredOutput
from agentmem.errors import ConfigError
from agentmem.evaluation.facts import SEED
from agentmem.evaluation.talk import other_talk
from agentmem.loading import load

LM_EVAL_ARMS = ("bare", "zero", "foreign")
"""What `arm=` takes."""

_Tokenised = tuple[tuple[str, str], list[int], list[int]]  # of lm-eval: the texts, the context, the continuation


@register_model("agentmem")
class AgentmemLM(HFLM):  # type: ignore[misc]
    """A model with its memory.

    A message or sentence adapter takes the prompt as one message: it is written when it ends, and the reply, which
    would be written at its own end, reads what was written.

    Args:
        pretrained: what `agentmem.load` takes.
        adapter, device, dtype: as for `agentmem.load`.
        arm: one of `LM_EVAL_ARMS`.
        batch_size: prompts at once, a number.
        max_length: most tokens of prompt and reply; None: what the model reads.
        seed: the talk of `foreign` is drawn from it.
        options: of lm-eval's class `hf`.

    Raises:
        ConfigError: there is no such arm, or the batch size is no number.
        MissingAdapterError: see `agentmem.load`.
    """

    def __init__(
        self,
        pretrained: str = "nano",
        adapter: str | None = None,
        arm: str = "zero",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_length: int | None = None,
        seed: int = SEED,
        **options: Any,
    ) -> None:
        if arm not in LM_EVAL_ARMS:
            raise ConfigError(f"arm is one of {', '.join(LM_EVAL_ARMS)}; found {arm!r}")
        if not str(batch_size).isdecimal():
            raise ConfigError(f"batch_size is a number, since states take their place too; found {batch_size!r}")
        with load(pretrained, False if arm == "bare" else adapter, device, dtype) as engine:
            full = engine.remember(next(other_talk(seed))).state if arm == "foreign" else None
        self.arm, self._memory = arm, engine.steered
        self._start: Tensor | None = None
        if self._memory is not None:
            self._start = self._memory.zeros()
            if full is not None:
                self._start = torch.tensor(full.matrices, device=self._start.device)[None]
        self._about = {
            "arm": arm,
            "model_fingerprint": engine.model_fingerprint,
            "adapter_fingerprint": engine.adapter_fingerprint,
        }
        super().__init__(
            engine.model,
            backend="causal",
            tokenizer=engine.tokenizer,
            batch_size=int(batch_size),
            max_length=max_length or engine.max_tokens_limit,
            **options,
        )

    def get_model_info(self) -> dict[str, Any]:
        """The arm, and the fingerprints of model and adapter, for the results file."""
        return self._about

    @torch.no_grad()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """The prompts [B, T], padded on the left, with their replies."""
        if options.get("do_sample") or options.get("temperature"):
            raise ConfigError("arms are compared with greedy decoding; leave do_sample and temperature out")
        if self._memory is None:
            generated: Tensor = super()._model_generate(context, max_length, stop, **options)
            return generated
        mask, ids = options["attention_mask"], context
        criteria = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], len(context))
        ends = torch.tensor(_end_ids(self.model), device=context.device)
        done = torch.zeros(len(context), dtype=torch.bool, device=context.device)
        out = self._read(context, mask)
        while True:
            assert out.logits is not None
            token = out.logits[:, -1].argmax(-1).masked_fill(done, self.tokenizer.pad_token_id)
            ids = torch.cat([ids, token[:, None]], 1)
            for criterion in criteria:
                criterion(ids, None)
                done |= torch.tensor(criterion.done_tracker, device=done.device)
            done |= torch.isin(token, ends)
            if bool(done.all()) or ids.shape[1] >= max_length:
                return ids
            mask = F.pad(mask, (0, 1), value=1)
            writing = ~done[:, None] if self._by_token else False
            out = self._memory(
                token[:, None], out.state, attention_mask=mask, write=writing, cache=out.cache, logits_to_keep=1
            )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[_Tokenised], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each continuation its log-probability, and whether it is what greedy decoding gives."""
        if self._memory is None:
            bare: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return bare
        size = override_bs or self.batch_size
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for first in range(0, len(order), size):
            numbers = order[first : first + size]
            answers = self._likelihoods([requests[n] for n in numbers])
            for number, answer in zip(numbers, answers, strict=True):
                found[number] = answer
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return found

    def _likelihoods(self, requests: Sequence[_Tokenised]) -> list[tuple[float, bool]]:
        continuations = [tokens for _, _, tokens in requests]
        longest = max(map(len, continuations))
        room = self.max_length - longest
        if room < 1:
            raise ConfigError(f"a continuation has {longest} tokens, and the model reads {self.max_length}; cut it")
        contexts = [tokens[-room:] for _, tokens, _ in requests]
        width = max(map(len, contexts))
        left = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in contexts], device=self.device)
        right = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in continuations], device=self.device)
        padded = torch.tensor([[0] * (width - len(row)) + row for row in contexts], device=self.device)
        wanted = torch.tensor([row + [0] * (longest - len(row)) for row in continuations], device=self.device)
        out = self._read(padded, left)
        assert out.logits is not None
        logits = out.logits[:, -1:]
        if longest > 1:
            assert self._memory is not None
            rest = self._memory(
                wanted[:, :-1],
                out.state,
                attention_mask=torch.cat([left, right[:, :-1]], 1),
                write=self._by_token,
                cache=out.cache,
            )
            assert rest.logits is not None
            logits = torch.cat([logits, rest.logits], 1)
        scores = logits.float().log_softmax(-1)  # [B, T, V]
        of_wanted = scores.gather(-1, wanted[..., None])[..., 0] * right
        greedy = (scores.argmax(-1) == wanted) | (right == 0)
        return list(zip(of_wanted.sum(-1).tolist(), greedy.all(-1).tolist(), strict=True))

    @property
    def _by_token(self) -> bool:
        assert self._memory is not None
        return self._memory.config.write_strategy == "token"

    def _read(self, ids: Tensor, mask: Tensor) -> SteeredOutput:
        """Read prompts [B, T], padded on the left, from the state that they begin with, and write them."""
        assert self._memory is not None
        assert self._start is not None
        steer: bool | Tensor = True
        if self._memory.config.steered_tokens == "reply":  # only the last token predicts one
            steer = torch.zeros_like(ids, dtype=torch.bool)
            steer[:, -1] = True
        return self._memory(
            ids,
            self._start.expand(len(ids), -1, -1, -1, -1).contiguous(),
            attention_mask=mask,
            segments=None if self._by_token else torch.zeros_like(ids),
            cache=True,
            logits_to_keep=1,
            steer=steer,
        )


def _end_ids(model: Any) -> list[int]:
    """The tokens that end a reply, beside those that lm-eval knows."""
    end = model.generation_config.eos_token_id
    return [] if end is None else end if isinstance(end, list) else [end]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
