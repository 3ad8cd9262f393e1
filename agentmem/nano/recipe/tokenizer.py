"""nano's tokenizer: byte-level BPE trained on the generated language, lossless on any text.

A token of a word may include the space before it and nothing else; digits do not even include that (groups of at most
four). BPE is trained on words without their spaces. Then merges are added until every word of every value that can be
stated is a single token: all that memory has to carry for a binding is which of the values it was. Last, every token of
Latin letters gets a second form with a space before it. So a word is split in the same way after a space as after a
quote, an underscore or a bracket (the two forms of its first token are *twins*), and a call can be copied from a
request token by token. For other scripts, characters of two bytes and kana are tokens, and so are the first two bytes
of characters of three.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from agentmem.nano.recipe import chatml, toolchat
from agentmem.nano.recipe.episodes import draw_episode
from agentmem.nano.recipe.pools import ACTIONS, ATTRIBUTES, JOBS, VERBS, WORDS
from agentmem.nano.recipe.spans import characters

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
LEARNED = 1500
_BARE = r"\p{L}+|\p{N}{1,4}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s"
_WORDS = r" ?\p{L}+|\p{N}{1,4}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

_LATIN = re.compile("[A-Za-z]+")
_SPACE = "Ġ"  # how byte-level BPE writes a space


def _corpus(seed: int, episodes: int) -> Iterator[str]:
    rng = Random(seed)
    markup = re.compile("|".join(map(re.escape, (*CONTROL, *MARKUP))))
    for _ in range(episodes):
        episode = draw_episode(rng)
        yield markup.sub("\n", "".join(piece.text for piece in chatml.render(episode.messages, episode.tools)))
        yield " ".join(toolchat.invented_word(rng) for _ in range(4))
    # Words that must become single tokens occur often, so that they share the tokens that they are merged from.
    for _ in range(episodes // 20):
        yield "\n".join(_whole_words())


def _whole_words() -> list[str]:
    """Words that must be single tokens: the letters and digits of values, names and requests."""
    value_words = {word for a in ATTRIBUTES.values() for text in (a.name, *a.values) for word in text.split()}
    words = (*value_words, *WORDS, *VERBS, *ACTIONS, *JOBS)
    return sorted({run for word in words for run in re.findall(r"[^\W\d_]+|\d{1,4}", word)})


def _complete(bpe: Tokenizer, words: Sequence[str]) -> Tokenizer:
    """Append merges, lowest rank last, until every word is one token (a pass repairs what the last one broke)."""
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


def _with_scripts(bpe: Tokenizer) -> Tokenizer:
    """Append merges of bytes of other scripts, so that names in them are fewer tokens and differ more."""
    spec = json.loads(bpe.to_str())
    vocabulary, merges = spec["model"]["vocab"], spec["model"]["merges"]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in characters():
        spelled = spell.pre_tokenize_str(character)[0][0]
        complete = len(spelled) < 3 or "\u3041" <= character <= "\u30f6"
        for end in range(2, len(spelled) + 1 if complete else min(3, len(spelled))):
            if spelled[:end] not in vocabulary:
                vocabulary[spelled[:end]] = len(vocabulary)
                merges.append([spelled[: end - 1], spelled[end - 1]])
    return Tokenizer.from_str(json.dumps(spec))


def _joined_with_spaces(bpe: Tokenizer) -> Tokenizer:
    """Append, lowest rank last, the merge of a space with every token of Latin letters."""
    spec = json.loads(bpe.to_str())
    vocabulary, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for token in sorted(vocabulary, key=vocabulary.get):
        if _LATIN.fullmatch(token):
            vocabulary[_SPACE + token] = len(vocabulary)
            merges.append([_SPACE, token])
    return Tokenizer.from_str(json.dumps(spec))


def _cut(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(seed: int = 0, *, episodes: int = 4_000, learned: int = LEARNED) -> PreTrainedTokenizerFast:
    """Train the tokenizer: `learned` byte-pair tokens from `episodes` conversations, whole words, spaces, markup.

    The same seed gives the same file.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = _cut(_BARE)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=learned, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator(_corpus(seed, episodes), trainer)
    bpe = _joined_with_spaces(_with_scripts(_complete(bpe, _whole_words())))
    bpe.pre_tokenizer = _cut(_WORDS)
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


def twins(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Pairs of ids (bare, after a space) of the same Latin letters, in order of the bare ids.

    A word is stated after a space and used in a call after a quote: a pair is the two tokens that stand for its text.
    """
    vocabulary = tokenizer.get_vocab()
    bare = (token for token in vocabulary if _LATIN.fullmatch(token) and _SPACE + token in vocabulary)
    return sorted((vocabulary[token], vocabulary[_SPACE + token]) for token in bare)
