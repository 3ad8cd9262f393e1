"""Training batches of nano's language; a batch depends only on a seed and its step number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from random import Random

from transformers import PreTrainedTokenizerBase

from agentmem.nano.recipe.chatml import TextPiece, render
from agentmem.nano.recipe.episodes import draw_episode
from agentmem.training.pretrain import REST_WEIGHT, LMBatch, pad_batch

_GROUP = 4  # steps drawn together and sorted by length, to reduce padding
COPY_STEPS = 180
_Row = tuple[list[int], list[float]]


class EpisodeEncoder:
    """Tokenizes rendered pieces, and caches the result."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.encode = lru_cache(maxsize=50_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def row(self, pieces: Sequence[TextPiece]) -> _Row:
        """The ids of the text, and each one's weight: 1 in replies, 0 in the system turn, `REST_WEIGHT` elsewhere.

        Tools and facts are drawn at random: learning to predict them would only compete with learning to read them.
        """
        ids: list[int] = []
        weights: list[float] = []
        for piece in pieces:
            tokens = self.encode(piece.text)
            ids += tokens
            silent = piece.text.startswith("<|im_start|>system")
            weights += [1.0 if piece.reply else 0.0 if silent else REST_WEIGHT] * len(tokens)
        return ids, weights


class BaseBatches:
    """Conversations for the base model, in a curriculum.

    The first `COPY_STEPS` batches are sequences of random tokens, repeated over and over, until the model has learned
    to look up what followed before. For the first 40 % of the steps every fourth batch is one of these, later every
    twelfth. Half of the sequences use few different tokens, so that what follows depends on more than the last one, as
    in names in other scripts, which are tokenised byte by byte. For the first 30 % of the steps all conversations are
    chats; then tools, facts and long conversations are added.

    Args:
        tokenizer: nano's tokenizer.
        seed: seed of all episodes.
        episodes: short conversations per batch; a batch of long ones has a third as many.
        steps: steps of the whole training, for the curriculum.
        skills: None for the curriculum; otherwise the share of tool and fact conversations from the first step on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        episodes: int,
        steps: int,
        skills: float | None = None,
    ) -> None:
        self._encoder = EpisodeEncoder(tokenizer)
        self._pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self._words = self._pad  # number of ids below the first special token
        self._seed, self._episodes, self._steps, self._skills = seed, episodes, steps, skills
        self._group: tuple[int, list[list[_Row]]] | None = None

    def __call__(self, step: int) -> LMBatch:
        """The batch of one step."""
        often = step < COPY_STEPS or (step < 0.4 * self._steps and step % 4 == 0)
        if step % 12 == 0 or (self._skills is None and often):
            return self._copies(step)
        number = step // _GROUP
        if self._group is None or self._group[0] != number:
            self._group = (number, self._draw(number))
        return pad_batch(self._group[1][step % _GROUP], self._pad)

    def _draw(self, number: int) -> list[list[_Row]]:
        rng = Random(f"base-{self._seed}-{number}")
        early = self._skills is None and number * _GROUP < 0.3 * self._steps
        skills = 0.0 if early else 0.4 if self._skills is None else self._skills
        long = not early and number % 6 == 5
        count = max(1, self._episodes // 3) if long else self._episodes
        drawn = [draw_episode(rng, long=long, skills=skills) for _ in range(count * _GROUP)]
        rows = sorted((self._encoder.row(render(e.messages, e.tools)) for e in drawn), key=lambda row: len(row[0]))
        batches = [rows[i * count : (i + 1) * count] for i in range(_GROUP)]
        rng.shuffle(batches)
        return batches

    def _copies(self, step: int) -> LMBatch:
        rng = Random(f"copy-{self._seed}-{step}")
        rows: list[_Row] = []
        for _ in range(2 * self._episodes):
            period = rng.randint(3, 16)
            few = rng.random() < 0.5
            pool = [rng.randrange(self._words) for _ in range(rng.randint(3, 6) if few else period)]
            run = [rng.choice(pool) for _ in range(period)] if few else pool
            rows.append(((run * 16)[:48], [0.0] * period + [1.0] * (48 - period)))
        return pad_batch(rows, self._pad)
