"""A reply's tokens as they arrive: to text, and the text to what is said, reasoning and tool calls.

`Detokenizer` gives complete characters only and keeps for every token how much text stood after it, so that a cut in
the text can be traced back to the tokens before it; `StopFinder` finds stop strings wherever tokens break.

`OutputParser` takes Qwen's and Hermes' form apart. It recognises delimiters by token where the tokenizer has them as
tokens, and by their text otherwise. A string argument that spells `</tool_call>` stays an argument either way: spelled
with ordinary tokens it is not the delimiter's token, and as text it counts only outside of JSON strings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentmem.messages import ToolCall

_REPLACEMENT = "\ufffd"  # what a tokenizer shows for an unfinished character
# Tokens after which bytes that make no character are shown as they are. `tokenizers.decoders.DecodeStream` does the
# work of `push` but for this: it holds such bytes until a character follows, for ever if none does.
_PATIENCE = 8


class Detokenizer:
    """The text of one reply, token by token.

    Attributes:
        ids: the tokens so far.
        text: their text, up to the last finished character.
        ends: for each token, the length of `text` after it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""
        self.ends: list[int] = []
        # Decoding starts one piece early, for tokenizers whose first token of a text loses its space.
        self._context_start = 0
        self._shown = 0  # tokens whose text stands in `text`

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes: often its own, empty inside a character."""
        self.ids.append(token)
        context = self._decode(self.ids[self._context_start : self._shown])
        extended = self._decode(self.ids[self._context_start :])
        piece = ""
        if not extended.endswith(_REPLACEMENT) or len(self.ids) - self._shown > _PATIENCE:
            piece = extended[len(context) :]
            self.text += piece
            self._context_start, self._shown = self._shown, len(self.ids)
        self.ends.append(len(self.text))
        return piece

    def tokens_within(self, length: int) -> int:
        """How many tokens lie within the first `length` characters, up to one that finishes a character."""
        ends, count = self.ends, len(self.ends)
        while count and ends[count - 1] > length:
            count -= 1
        # Tokens that added no text are the beginning of a character that is not finished.
        while count and ends[count - 1] == (ends[count - 2] if count > 1 else 0):
            count -= 1
        return count

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class StopFinder:
    """Looks for the first stop string in a growing text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._searched = 0
        self._longest = max((len(stop) for stop in self._stops), default=0)

    def find(self, text: str) -> int | None:
        """Where the first stop string begins, or None."""
        start = max(0, self._searched - self._longest + 1)
        positions = [at for stop in self._stops if (at := text.find(stop, start)) >= 0]
        self._searched = len(text)
        return min(positions) if positions else None

    def safe(self, text: str) -> int:
        """Length of the part of `text` in which no stop string can begin any more."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return len(text) - length
        return len(text)


Kind = Literal["text", "reasoning", "tool_call"]

_OPEN: dict[str, Kind] = {"<think>": "reasoning", "<tool_call>": "tool_call"}
_CLOSE = {"reasoning": "</think>", "tool_call": "</tool_call>"}
# JSON strings hold no line breaks, so a quote that is never closed hides the end of a call on its own line only. A
# partial JSON parser cannot say whether a text ends inside a string: it drops an unfinished key and an unfinished pair
# alike.
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')


@dataclass(frozen=True)
class Delta:
    """A piece of a reply as it is decoded; for a tool call the raw text of its JSON, and the id of the call."""

    text: str
    kind: Kind = "text"
    call: str = ""


@dataclass(frozen=True)
class InvalidToolCall:
    """A call that is not a JSON object with a name and an object of arguments: its text, what is wrong, its id."""

    text: str
    error: str
    id: str = ""


@dataclass(frozen=True)
class Tags:
    """The delimiters of one tokenizer: those that are tokens, by id, and those that are only text."""

    by_token: Mapping[int, str]
    by_text: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Tags:
        """Look the delimiters up in a vocabulary (slow for large ones: do it once)."""
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        tags = [*_OPEN, *_CLOSE.values()]
        by_token = {vocabulary[tag]: tag for tag in tags if tag in vocabulary}
        return cls(by_token, tuple(tag for tag in tags if tag not in vocabulary))


@dataclass(frozen=True)
class ParsedReply:
    """A finished reply, taken apart."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    invalid_tool_calls: tuple[InvalidToolCall, ...]


class OutputParser:
    """Takes a reply's tokens and text as they come and gives deltas; at the end, the reply taken apart."""

    def __init__(self, tags: Tags, seed: bytes, start: Kind = "text", *, json_text: bool = False) -> None:
        """Begin a reply.

        Args:
            tags: the tokenizer's delimiters.
            seed: what ids of calls follow from, together with their place: `call_` and 24 hex digits.
            start: the region that the prompt left open (reasoning, where the template opens `<think>`).
            json_text: the text, if there is any, is JSON; what its strings spell does not open a region.
        """
        self._tags = tags
        self._json_text = json_text
        self._seed = seed
        self._calls = 0
        self._kind: Kind = start
        self._regions: list[list[str]] = [[start, ""]]
        self._held = ""

    def push(self, token: int, text: str) -> list[Delta]:
        """Add a token and the text that it completed."""
        tag = self._tags.by_token.get(token)
        if tag is not None and self._may_switch(tag):
            head, _, tail = text.partition(tag)
            deltas = [*self._add(head), *self._flush()]
            self._switch(tag)
            return [*deltas, *self._add(tail)]
        return self._add(text)

    def finish(self) -> list[Delta]:
        """The text that was held back as the possible start of a delimiter."""
        return self._flush()

    def parsed(self) -> ParsedReply:
        """The reply, once it is finished."""
        calls: list[ToolCall] = []
        invalid: list[InvalidToolCall] = []
        for index, text in enumerate(body for kind, body in self._regions if kind == "tool_call"):
            try:
                name, arguments = _call(text)
            except ValueError as error:
                invalid.append(InvalidToolCall(text.strip(), str(error), self._call_id(index)))
            else:
                calls.append(ToolCall(name, arguments, self._call_id(index)))
        content = "".join(body for kind, body in self._regions if kind == "text")
        reasoning = "".join(body for kind, body in self._regions if kind == "reasoning")
        structured = len(self._regions) > 1
        return ParsedReply(content.strip() if structured else content, reasoning.strip(), tuple(calls), tuple(invalid))

    def _may_switch(self, tag: str) -> bool:
        return tag in _OPEN if self._kind == "text" else tag == _CLOSE[self._kind]

    def _switches(self, tag: str, at: int) -> bool:
        """Whether a delimiter at this place of the held text counts."""
        if not self._may_switch(tag) or self._kind == "reasoning":
            return self._may_switch(tag)
        region = self._regions[-1][1] + self._held[:at]
        if self._kind == "text":
            return not (self._json_text and region.strip())
        # Without its finished strings, a quote on the last line opens one in which the delimiter stands.
        return '"' not in _STRING.sub("", region).rpartition("\n")[2]

    def _next(self) -> tuple[int, str] | None:
        """The first delimiter in the held text that counts, and where it is."""
        places = [(m.start(), tag) for tag in self._tags.by_text for m in re.finditer(re.escape(tag), self._held)]
        return next(((at, tag) for at, tag in sorted(places) if self._switches(tag, at)), None)

    def _switch(self, tag: str) -> None:
        self._kind = _OPEN.get(tag, "text")
        self._calls += self._kind == "tool_call"
        self._regions.append([self._kind, ""])

    def _add(self, text: str) -> list[Delta]:
        if not self._tags.by_text:
            return self._emit(text)
        self._held += text
        deltas: list[Delta] = []
        while (delimiter := self._next()) is not None:
            at, tag = delimiter
            deltas += self._emit(self._held[:at])
            self._held = self._held[at + len(tag) :]
            self._switch(tag)
        ready = len(self._held)
        for length in range(min(len(self._held), max(map(len, self._tags.by_text)) - 1), 0, -1):
            if any(tag.startswith(self._held[-length:]) for tag in self._tags.by_text):
                ready -= length
                break
        deltas += self._emit(self._held[:ready])
        self._held = self._held[ready:]
        return deltas

    def _flush(self) -> list[Delta]:
        held, self._held = self._held, ""
        return self._emit(held)

    def _emit(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._regions[-1][1] += text
        return [Delta(text, self._kind, self._call_id(self._calls - 1) if self._kind == "tool_call" else "")]

    def _call_id(self, index: int) -> str:
        return f"call_{hashlib.sha256(self._seed + index.to_bytes(4, 'big')).hexdigest()[:24]}"


def _call(text: str) -> tuple[str, dict[str, Any]]:
    try:
        body = json.loads(text, parse_constant=_refuse)
        # Half a surrogate pair can be spelled in JSON, and then no tokenizer takes it.
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(body, dict) or not isinstance(body.get("name"), str):
        raise ValueError('expected a JSON object with a "name"')
    arguments = body.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError(f'"arguments" must be a JSON object; found {type(arguments).__name__}')
    return body["name"], arguments


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
