"""Ids of a text that is encoded in pieces are those of the whole, and what was encoded is not encoded again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentmem.messages import MessageCache
from agentmem.prompt.template import Encoder, any_of
from tests.helpers.transcript_templates import CHATML, tokenizer

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "[INST]"]


def sentencepiece(scheme: str, **flags: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that marks the start of a text (first, always) or of every piece (legacy)."""
    backend = Tokenizer(models.BPE())
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["hello there, how are you today? a b c \n ! ▁"] * 3, trainer)
    backend.add_special_tokens([AddedToken(text, normalized=False, **flags) for text in CONTROL[2:]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<s>")


TOKENIZERS = {
    "byte level": tokenizer(CHATML),
    "trimmed offsets": tokenizer(CHATML, True),
    **{scheme: sentencepiece(scheme) for scheme in ("first", "always", "legacy")},
    "takes what is right": sentencepiece("first", rstrip=True),
    "takes what is left": sentencepiece("first", lstrip=True),
    "whole words": sentencepiece("first", single_word=True),
}

texts = st.lists(
    st.sampled_from([*CONTROL, "hello there", " ", "\n", "\n\n", "a", "b c", "!", "<|im_", "é"]), max_size=14
)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=3))
def test_pieces_give_the_ids_of_the_whole(kind: str, given_texts: list[list[str]]) -> None:
    tok = TOKENIZERS[kind]
    encoder = Encoder(tok, MessageCache(4000))
    for parts in [*given_texts, *given_texts]:
        text = "".join(parts)
        ids, starts = encoder.encode(text)
        assert ids == tok(text, add_special_tokens=False)["input_ids"]
        assert len(starts) == len(ids)
        assert starts == sorted(starts)


@given(st.sets(st.text("ab\n<", min_size=1, max_size=4)), st.text("ab\n<", max_size=30))
def test_the_longest_token_at_a_place_is_found(tokens: set[str], text: str) -> None:
    found, at = [], 0
    while at < len(text):
        here = max((token for token in tokens if text.startswith(token, at)), key=len, default="")
        found += [here] if here else []
        at += len(here) or 1
    assert any_of(tokens).findall(text) == found
