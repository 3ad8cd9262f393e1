"""Training examples: the passes that an engine would run for a conversation, planned by the engine's own code.

An engine writes a history in one of three ways, and an adapter has to work with all of them:

    turns       every reply was a turn: its prompt shows the window, new messages are written, then the reply
    exchanges   messages were remembered up to each reply, without a prompt (`Engine.remember`)
    whole       the history came all at once, and what no prompt shows was written in long passes

`ExampleMaker` asks `plan_turn` and `plan_remember` what they would do, so window, template, segments and write rules
are those of the engine. An `Example` holds passes that follow each other through the state, and questions that each
start from the state after the last pass. `collate` lays examples out as tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from random import Random
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from agentmem.delta.config import SteeredTokens, WriteStrategy
from agentmem.errors import ConfigError, DataError
from agentmem.generation.plan import CatchUp, Request, plan_remember, plan_turn
from agentmem.messages import Message
from agentmem.prompt.transcript import Transcript, Window, sentence_numbers
from agentmem.record import ConsumedRecord
from agentmem.state import MemoryState
from agentmem.training.conversations import Ask, Conversation

History = Literal["turns", "exchanges", "whole", "mixed"]

_LAST_MESSAGE = Window(messages=1)
_WAYS: tuple[History, ...] = ("turns", "exchanges", "whole")
_REPLY_WEIGHT = 3.0
"""Total weight of a reply that is judged as a whole, so that long replies do not outweigh the values of others."""
_OPENING_WEIGHT = 0.5
"""Least weight of the token that a reply to a question opens with. It decides between an answer and saying that there
is none, so it has to weigh the same in both; with the weight of what surrounds a value it was learned too late."""
_LEAST_ROWS = 12
"""Fewest questions that are run together: each call has a cost of its own."""
_PLANNED = "planned"  # in place of the fingerprints of a state that is never run


@dataclass(frozen=True)
class Pass:
    """Tokens that go through the model together, from position 0.

    Attributes:
        ids: token ids.
        segments: the segment of each, -1 where the token is only read; for token adapters only the sign matters.
        weights: the weight of predicting each token in the loss; 0 = it does not count.
        split: where the second of two write passes begins, which reads on in the KV of the first: message and sentence
            adapters write the prompt's messages before the reply. `len(ids)` where there is one.
        reply_from: the first token that predicts one of a reply; `len(ids)` where there is none.
    """

    ids: list[int]
    segments: list[int]
    weights: list[float]
    split: int
    reply_from: int = 0

    @property
    def counts(self) -> bool:
        """Whether any token counts in the loss."""
        return any(self.weights)


@dataclass(frozen=True)
class Example:
    """What is written, in order, and the questions afterwards, each of which starts from the state after all passes.

    Attributes:
        passes: the written history; passes of a conversation's own replies may count in the loss.
        asks: questions with their replies.
        origin: where the conversation comes from.
    """

    passes: tuple[Pass, ...]
    asks: tuple[Pass, ...]
    origin: str = ""

    @property
    def weight(self) -> float:
        """Total weight in the loss."""
        return sum(sum(each.weights) for each in (*self.passes, *self.asks))


class ExampleMaker:
    """Turns conversations into examples.

    Args:
        transcript: renders messages, as the engine's does.
        tokenizer: the tokenizer, for the places of values in a reply.
        strategy: the adapter's write strategy.
        limit: the model's longest context, in tokens.
        window: what prompts show.
        history: how the history is written; "mixed" draws one of the others for each conversation.
        other_weight: the weight of a reply's tokens outside of its values, where the values are known.

    Raises:
        ConfigError: `history` is unknown.
    """

    def __init__(
        self,
        transcript: Transcript,
        tokenizer: Any,
        strategy: WriteStrategy,
        limit: int,
        *,
        window: Window = _LAST_MESSAGE,
        history: History = "mixed",
        other_weight: float = 0.1,
    ) -> None:
        if history not in get_args(History):
            raise ConfigError(f"history must be one of {', '.join(get_args(History))}; found {history!r}")
        self._transcript, self._tokenizer = transcript, tokenizer
        self._strategy: WriteStrategy = strategy
        self._limit, self._window, self._history = limit, window, history
        self._other_weight = other_weight
        self._closing = transcript.closing_ids()
        opened = transcript.render([Message("user", "x")], add_generation_prompt=True)
        self._opening = [token for token, owner in zip(opened.input_ids, opened.owner, strict=True) if owner == 1]
        # The matrices play no part in a plan, so they are as small as can be.
        self._empty = MemoryState.zeros((1, 1, 1, 1), _PLANNED, _PLANNED)
        self._reply_ids = lru_cache(maxsize=65_536)(self._render_reply)

    def __call__(self, conversation: Conversation, rng: Random) -> Example:
        """The example of a conversation.

        Args:
            conversation: messages with questions after them, or with replies that count.
            rng: draws what is left open: how the history is written, and which reply is the target where the history
                is not written turn by turn.

        Raises:
            DataError: nothing in it counts in the loss, or a message is longer than the model's context.
            TranscriptError, WindowError: the template refuses it, or the window cannot show it.
        """
        messages, way = conversation.messages, self._history
        if way == "mixed":
            way = rng.choice(_WAYS)
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        targets = [i for i in replies if conversation.train[i]]
        target: int | None = None
        if not conversation.asks:
            if not targets:
                raise DataError(f"{conversation.origin or 'a conversation'}: no reply counts in the loss")
            target = targets[-1] if way == "turns" else rng.choice(targets)
        stop = len(messages) if target is None else max((i + 1 for i in replies if i < target), default=0)

        passes, consumed = list[Pass](), 0
        if way != "whole":
            for reply in replies:
                if reply >= stop:
                    break
                if way == "turns":
                    passes += self._turn(conversation, reply, consumed)
                else:
                    passes += self._remember(messages[: reply + 1], consumed, conversation.origin)
                consumed = reply + 1
        if consumed < stop:
            passes += self._remember(messages[:stop], consumed, conversation.origin)
        if target is not None:
            passes += self._turn(conversation, target, stop)
        return Example(
            tuple(passes), tuple(self._ask(conversation, ask) for ask in conversation.asks), conversation.origin
        )

    def _turn(self, conversation: Conversation, index: int, consumed: int) -> Iterator[Pass]:
        """The passes of the turn whose reply is message `index`, after `consumed` messages were consumed."""
        weight = 1.0 if conversation.train[index] else 0.0
        ids, content = self._reply_ids(conversation.messages[index])
        weights = [weight if n <= content else 0.0 for n in range(len(ids))]
        history, reply = conversation.messages[:index], conversation.messages[index]
        yield from self._planned(history, consumed, conversation.tools, reply, weights, conversation.origin)

    def _ask(self, conversation: Conversation, ask: Ask) -> Pass:
        """The pass of a question after the whole conversation."""
        messages = conversation.messages
        history = (*messages, *ask.messages)
        weights = self._ask_weights(ask)
        tools = ask.tools or conversation.tools
        *before, last = self._planned(history, len(messages), tools, ask.reply, weights, conversation.origin)
        if before:
            raise DataError(
                f"{conversation.origin or 'a conversation'}: the messages of a question must show in its prompt; a "
                f"window that shows {len(ask.messages)} messages is needed"
            )
        return last

    def _planned(
        self,
        history: Sequence[Message],
        consumed: int,
        tools: Sequence[Any],
        reply: Message,
        weights: Sequence[float],
        origin: str,
    ) -> Iterator[Pass]:
        request = Request(history, {"window": self._window, "tools": tools})
        plan = plan_turn(request, self._state(history[:consumed]), self._transcript, self._strategy, self._limit)
        yield from self._chunks(plan, origin)
        ids, content = self._reply_ids(reply)
        if self._strategy == "sentence":
            numbers = sentence_numbers(reply.content, ids[:content], self._encode)
            segments = [*([-1] * len(plan.generation_prompt)), *numbers, *([-1] * (len(ids) - content))]
        else:
            segments = [0] * (len(plan.generation_prompt) + len(ids))
        prompt = plan.prompt
        every = [*prompt.ids, *plan.generation_prompt, *ids]
        yield Pass(
            every,
            [*prompt.segments, *segments],
            [*([0.0] * (len(prompt.ids) + len(plan.generation_prompt))), *weights],
            len(every) if self._strategy == "token" else len(prompt.ids),
            len(prompt.ids) + len(plan.generation_prompt) - 1,
        )

    def _remember(self, messages: Sequence[Message], consumed: int, origin: str) -> Iterator[Pass]:
        """The passes that write messages without a prompt, after `consumed` of them were consumed."""
        state = self._state(messages[:consumed])
        yield from self._chunks(plan_remember(messages, state, self._transcript, self._strategy, self._limit), origin)

    def _chunks(self, plan: CatchUp, origin: str) -> Iterator[Pass]:
        for chunk in plan.catch_up_chunks:
            if not chunk.closes:
                raise DataError(f"{origin or 'a conversation'}: a message is longer than the model's context")
            yield Pass(chunk.ids, chunk.segments, [0.0] * len(chunk.ids), len(chunk.ids), len(chunk.ids))

    def _state(self, messages: Sequence[Message]) -> MemoryState:
        """A state that has consumed these messages."""
        record = ConsumedRecord.empty().align(self._transcript.history(messages)).record
        return self._empty.replaced(record=record)

    def _render_reply(self, reply: Message) -> tuple[list[int], int]:
        """The tokens of a reply after the generation prompt, its end included, and how many of them are content."""
        rendered = self._transcript.render([Message("user", "x"), reply], add_generation_prompt=False)
        own = [token for token, owner in zip(rendered.input_ids, rendered.owner, strict=True) if owner == 1]
        # What a template opens a reply with may have more in a prompt (a block of reasoning) than in a history.
        start = next(
            (n for n, (a, b) in enumerate(zip(own, self._opening, strict=False)) if a != b), len(self._opening)
        )
        ids = own[start:]
        ends = len(self._closing) and ids[-len(self._closing) :] == self._closing
        return ids, len(ids) - len(self._closing) if ends else len(ids) - 1

    def _ask_weights(self, ask: Ask) -> list[float]:
        """The weight of each token of a reply: full for what decides and what follows it, so that values end right."""
        ids, content = self._reply_ids(ask.reply)
        weights = [min(1.0, _REPLY_WEIGHT / (content + 1)) if n <= content else 0.0 for n in range(len(ids))]
        weights[0] = max(weights[0], _OPENING_WEIGHT)
        encoded = self._tokenizer(ask.reply.content, add_special_tokens=False, return_offsets_mapping=True)
        spans = list(_spans(ask.reply.content, (*ask.values, *ask.decisive)))
        if not spans or encoded["input_ids"] != ids[:content]:
            return weights
        weights = [self._other_weight if n <= content else 0.0 for n in range(len(ids))]
        weights[0] = max(self._other_weight, _OPENING_WEIGHT)
        for n, (start, stop) in enumerate(encoded["offset_mapping"]):
            if any(start < last and first < stop for first, last in spans):
                weights[n] = weights[n + 1] = 1.0
        return weights

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def _spans(text: str, values: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The places of values in a text."""
    for value in values:
        start = text.find(value) if value else -1
        while start >= 0:
            yield start, start + len(value)
            start = text.find(value, start + len(value))


def collate(
    examples: Sequence[Example], pad: int, *, joined: bool, steered_tokens: SteeredTokens = "all"
) -> dict[str, Any]:
    """Lay examples out as tensors.

    Args:
        examples: B examples.
        pad: the token id of padding.
        joined: put all passes of an example into one row, with a block for each (`blocks`); they are then computed in
            one call. Only for token adapters, for which this changes no number.
        steered_tokens: of the adapter's config.

    Returns:
        `passes`, a list of layouts to run one after another, and `asks`, one layout or None. A layout is a dict of
        ids, positions, segments [N, T] int64, weights [N, T] float32, and
            rows: [N] int64, which of the B examples each row belongs to;
            steered: [N, T] bool, which tokens the memory corrects;
            blocks: [N, T] int64, the pass of each token, -1 = padding (only if `joined`);
            cuts: ascending columns, the last of them T: up to each the columns are run in a call of their own. Before
                the second of two write passes this is what the adapter asks for; before what an example's questions do
                not share, and before the first token that is steered, it saves time;
            first, of: [n] and [N] int64, which rows have a beginning that others share, and which of the n each row
                continues (only where questions share one). Columns before the first cut need those n rows only;
            groups: ascending rows, the last of them N: rows up to each are of like length, and better run apart from
                the others than padded to the longest (only of questions).
    """
    passes: list[dict[str, Any]] = []
    if joined:
        rows = [(n, example.passes) for n, example in enumerate(examples) if example.passes]
        if rows:
            passes = [_joined(group, pad) for group in _of_like_length(rows)]
    else:
        for place in range(max((len(example.passes) for example in examples), default=0)):
            chosen = [(n, e.passes[place]) for n, e in enumerate(examples) if place < len(e.passes)]
            passes.append(_apart(chosen, pad))
    asks = [(n, ask) for n, example in enumerate(examples) for ask in example.asks]
    replies_only = steered_tokens == "reply"
    questions = _questions(asks, pad, replies_only=replies_only, gaps=joined) if asks else None
    if not replies_only:
        for layout in [*passes, *([] if questions is None else [questions])]:
            layout["steered"] = torch.ones_like(layout["steered"])
    return {"count": len(examples), "passes": passes, "asks": questions}


def _of_like_length(
    rows: Sequence[tuple[int, Sequence[Pass]]],
) -> Iterator[list[tuple[int, Sequence[Pass]]]]:
    """Rows in groups of which none is padded to more than 4/3 of its length."""
    lengths = {row: sum(len(each.ids) for each in passes) for row, passes in rows}
    group: list[tuple[int, Sequence[Pass]]] = []
    for row in sorted(rows, key=lambda each: lengths[each[0]]):
        if group and 4 * lengths[group[0][0]] < 3 * lengths[row[0]]:
            yield group
            group = []
        group.append(row)
    yield group


def _questions(rows: Sequence[tuple[int, Pass]], pad: int, *, replies_only: bool, gaps: bool) -> dict[str, Any]:
    """Rows of one question each.

    What all questions of an example begin with (the system message) is to be run once. Where only replies are steered,
    what comes before them is to be run without gradients.

    Args:
        gaps: whether padding may stand between the parts of a row.
    """
    if any(each.split < len(each.ids) for _, each in rows):
        return _apart(rows, pad)  # message and sentence adapters have two parts already
    numbers = sorted({row for row, _ in rows})
    shared = {number: _common([each for row, each in rows if row == number]) for number in numbers}
    shares = len(numbers) < len(rows) and all(shared.values())
    replies_only = replies_only and (gaps or not shares)
    rows = sorted(rows, key=lambda row: len(row[1].ids) - shares * shared[row[0]])
    ends = [
        (*([shared[row]] * shares), *([each.reply_from] * replies_only), len(each.ids)) for row, each in rows
    ]  # ascending
    layout = _apart(rows, pad, ends)
    layout["groups"] = _groups([len(each.ids) - shares * shared[row] for row, each in rows])
    if shares:
        owners = layout["rows"]
        layout["first"] = torch.tensor([owners.tolist().index(number) for number in numbers])
        layout["of"] = torch.searchsorted(torch.tensor(numbers), owners)
    return layout


def _groups(lengths: Sequence[int]) -> tuple[int, ...]:
    """Where groups of rows end, of ascending lengths: none is padded by a third, unless it would be too small."""
    ends = [len(lengths)]
    while True:
        last = next((n for n, length in enumerate(lengths) if 4 * length >= 3 * lengths[ends[-1] - 1]), 0)
        last = min(last, ends[-1] - _LEAST_ROWS)
        if last < _LEAST_ROWS:
            return tuple(reversed(ends))
        ends.append(last)


def _common(questions: Sequence[Pass]) -> int:
    """How many tokens questions have in common, at least one before the first that counts."""
    limit = min(next((n for n, w in enumerate(q.weights) if w), len(q.ids)) for q in questions) - 1
    first = questions[0]
    for n in range(limit):
        if any((q.ids[n], q.segments[n]) != (first.ids[n], first.segments[n]) for q in questions):
            return n
    return max(0, limit)


def _joined(rows: Sequence[tuple[int, Sequence[Pass]]], pad: int) -> dict[str, Any]:
    """Rows of several passes each."""
    whole = [Pass([t for p in passes for t in p.ids], [], [], 0) for _, passes in rows]
    segments = [[s for p in passes for s in p.segments] for _, passes in rows]
    weights = [[w for p in passes for w in _shifted_in(p.weights)] for _, passes in rows]
    blocks = [[n for n, p in enumerate(passes) for _ in p.ids] for _, passes in rows]
    positions = [[n for p in passes for n in range(len(p.ids))] for _, passes in rows]
    steered = [[n >= p.reply_from for p in passes for n in range(len(p.ids))] for _, passes in rows]
    length = max(len(each.ids) for each in whole)
    return {
        "rows": torch.tensor([row for row, _ in rows]),
        "ids": _padded([each.ids for each in whole], length, pad, torch.int64),
        "segments": _padded(segments, length, -1, torch.int64),
        "weights": _padded(weights, length, 0.0, torch.float32),
        "positions": _padded(positions, length, 0, torch.int64),
        "steered": _padded(steered, length, 0, torch.bool),
        "blocks": _padded(blocks, length, -1, torch.int64),
        "cuts": (length,),
    }


def _apart(rows: Sequence[tuple[int, Pass]], pad: int, ends: Sequence[tuple[int, ...]] | None = None) -> dict[str, Any]:
    """Rows of one pass each, in parts that begin at the same column in every row.

    Args:
        ends: where each row's parts end, ascending; None: the two write passes are the parts.
    """
    if ends is None:
        two = any(each.split < len(each.ids) for _, each in rows)
        ends = [(each.split, len(each.ids)) if two else (len(each.ids),) for _, each in rows]
    sizes = [[stop - start for start, stop in pairwise((0, *each))] for each in ends]
    widths = [max(column) for column in zip(*sizes, strict=True)]
    cuts = tuple(accumulate(widths))

    def laid(values: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
        """Each part but the last stands at the right of its columns: inside of a first part padding would be read."""
        out = torch.full((len(rows), cuts[-1]), fill, dtype=dtype)
        for row, value, stops, lengths in zip(out, values, ends, sizes, strict=True):
            starts = [cut - size for cut, size in zip(cuts[:-1], lengths, strict=False)] + [cuts[-1] - widths[-1]]
            for column, stop, size in zip(starts, stops, lengths, strict=True):
                row[column : column + size] = torch.tensor(value[stop - size : stop], dtype=dtype)
        return out

    passes = [each for _, each in rows]
    mask = laid([[1] * len(each.ids) for each in passes], 0, torch.int64)
    return {
        "rows": torch.tensor([row for row, _ in rows]),
        "ids": laid([each.ids for each in passes], pad, torch.int64),
        "segments": laid([each.segments for each in passes], -1, torch.int64),
        "weights": laid([_shifted_in(each.weights) for each in passes], 0.0, torch.float32),
        "positions": (mask.cumsum(-1) - 1).clamp_min(0),
        "steered": laid([[n >= each.reply_from for n in range(len(each.ids))] for each in passes], 0, torch.bool),
        "mask": mask,
        "cuts": tuple(cut for cut, width in zip(cuts, widths, strict=True) if width),
    }


def _shifted_in(weights: Sequence[float]) -> Sequence[float]:
    """The weights of a pass whose first token nothing predicts."""
    return [0.0, *weights[1:]]


def _padded(values: Sequence[Sequence[float]], length: int, fill: float, dtype: torch.dtype) -> Tensor:
    out = torch.full((len(values), length), fill, dtype=dtype)
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = torch.tensor(value, dtype=dtype)
    return out
