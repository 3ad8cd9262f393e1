"""nano's tokenizer: byte-level BPE trained on the generated language, lossless on any text.

Words take the space before them with them and nothing else, so that a name has the same tokens after a quote, an
underscore or a bracket, and digits not even that (groups of at most four): a call can be copied from a request piece by
piece. After training, merges are added until every value that can be told is one token a word: what memory has to carry
for a binding is then which of the values it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentmem.nano import chatml, toolchat
from agentmem.nano.episodes import draw_episode
from agentmem.nano.pools import ATTRIBUTES, WORDS

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
LEARNED = 2500
_WORDS = r" ?\p{L}+|\p{N}{1,4}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def _corpus(seed: int, episodes: int) -> Iterator[str]:
    rng = Random(seed)
    markup = re.compile("|".join(map(re.escape, (*CONTROL, *MARKUP))))
    for _ in range(episodes):
        episode = draw_episode(rng)
        yield markup.sub("\n", "".join(piece.text for piece in chatml.render(episode.messages, episode.tools)))
        yield " ".join(toolchat.invented_word(rng) for _ in range(4))
    # Words that must become whole are shown often, so that they share the tokens that they are merged from.
    for _ in range(episodes // 20):
        yield "\n".join(_whole_words())


def _whole_words() -> list[str]:
    """Words that must be one token: pool values as they stand after a space or alone, and the nouns in both places."""
    values = sorted({word for attribute in ATTRIBUTES.values() for value in attribute.values for word in value.split()})
    runs = {run for word in (*values, *WORDS) for run in re.findall(r"[^\W\d_]+|\d{1,4}", word)}
    spaced = {f" {run}" for run in runs if not run.isdigit()}
    return sorted(spaced) + sorted(run for run in runs if run.isdigit()) + sorted(WORDS)


def _complete(bpe: Tokenizer, words: Sequence[str]) -> Tokenizer:
    """Append merges, lowest rank last, until every word is one token (a pass settles what the last one disturbed)."""
    for _ in range(8):
        spec = json.loads(bpe.to_str())
        vocabulary, merges = spec["model"]["vocab"], spec["model"]["merges"]
        for word in words:
            tokens = bpe.encode(word).tokens
            for left, right in zip(["".join(tokens[:i]) for i in range(1, len(tokens))], tokens[1:], strict=True):
                if left + right not in vocabulary:
                    vocabulary[left + right] = len(vocabulary)
                if [left, right] not in merges:
                    merges.append([left, right])
        bpe = Tokenizer.from_str(json.dumps(spec))
        if all(len(bpe.encode(word).tokens) == 1 for word in words):
            break
    return bpe


def train_tokenizer(seed: int = 0, *, episodes: int = 4_000, learned: int = LEARNED) -> PreTrainedTokenizerFast:
    """Train the tokenizer: ``learned`` byte-pair tokens from ``episodes`` conversations, then whole words, then markup.

    The same seed gives the same file.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=learned, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator(_corpus(seed, episodes), trainer)
    bpe = _complete(bpe, _whole_words())
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    bpe.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKUP])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = chatml.TEMPLATE
    return tokenizer
