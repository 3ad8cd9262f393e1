"""Ids of a text that is encoded in pieces are those of the whole; the one cache of seen messages is bounded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from random import Random
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


def test_what_is_used_stays_and_what_is_not_goes() -> None:
    cache = MessageCache(20_000)
    cache.put("used", 1, 100)
    cache.put("unused", 2, 100)
    for number in range(200):
        cache.put(number, number, 100)
        assert cache.get("used") == 1
    assert cache.get("unused") is None
    assert cache.get(199) == 199
    assert cache.get_all([199, "unused", "used"]) == [199, None, 1]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4000)), max_size=80))
def test_it_never_takes_more_than_its_limit(entries: list[tuple[int, int]]) -> None:
    cache = MessageCache(10_000)
    for key, size in entries:
        cache.put(key, key, size)
        assert cache.size <= 10_000
        assert cache.get(key) == key
        assert cache.size <= 10_000
    cache.put("half of the limit", 1, 5_000)
    assert cache.get("half of the limit") is None


def test_many_threads_use_it_at_once() -> None:
    cache = MessageCache(50_000)

    def work(seed: int) -> bool:
        rng = Random(seed)
        for _ in range(2000):
            key = rng.randrange(400)
            if cache.get(key) not in (None, key):
                return False
            cache.put(key, key, rng.randrange(300))
        return cache.size <= 50_000

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
