"""Small byte-level tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
REASONING_AND_CALLS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def byte_bpe(
    texts: Iterable[str],
    template: str,
    *,
    control: Sequence[str] = CHATML_CONTROL,
    tags: Sequence[str] = (),
    vocab_size: int = 30_000,
    trim_offsets: bool = False,
    **options: Any,
) -> Any:
    """A BPE that was trained on a few texts; `control` tokens are special, `tags` are tokens of the text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(control),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    if trim_offsets:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | options
    )
    made.chat_template = template
    return made
