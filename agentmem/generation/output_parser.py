"""Turns a reply's tokens, as they arrive, into text, and the text into content, reasoning and tool calls.

`Detokenizer` returns complete characters only. It records for every token how long the text was after it, so that a cut
in the text can be traced back to the tokens before it. `StopFinder` finds stop strings wherever the tokens break.

`OutputParser` parses the format of Qwen and Hermes. It recognises delimiters by their token ids where the tokenizer has
tokens for them, and by their text otherwise. In both cases a string argument that contains `</tool_call>` remains an
argument: spelled with ordinary tokens it is not the delimiter's token, and as text a delimiter counts only outside of
JSON strings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentmem.messages import ToolCall
from agentmem.text import parse_json

_REPLACEMENT = "\ufffd"  # how tokenizers decode an incomplete character
# After this many tokens, bytes that form no character are shown as they are. `tokenizers.decoders.DecodeStream` would
# otherwise do the work of `push`, but it holds such bytes until a character follows, for ever if none does.
_PATIENCE = 8


class Detokenizer:
    """The text of one reply, token by token.

    Attributes:
        ids: the tokens so far.
        text: their text, up to the last complete character.
        ends: for each token, the length of `text` after it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""
        self.ends: list[int] = []
        # Decoding starts one token early, for tokenizers that drop the space of the first token of a text.
        self._context_start = 0
        self._shown = 0  # number of tokens whose text is in `text`

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes: usually its own, nothing inside a character."""
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
        """The number of tokens within the first `length` characters, up to the end of a complete character."""
        ends, count = self.ends, len(self.ends)
        while count and ends[count - 1] > length:
            count -= 1
        # Tokens that added no text are the start of a character that is still incomplete.
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
        """The position at which the first stop string begins, or None."""
        start = max(0, self._searched - self._longest + 1)
        positions = [at for stop in self._stops if (at := text.find(stop, start)) >= 0]
        self._searched = len(text)
        return min(positions) if positions else None

    def safe(self, text: str) -> int:
        """The length of the part of `text` in which a stop string can no longer begin."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return len(text) - length
        return len(text)


Kind = Literal["text", "reasoning", "tool_call"]

_OPEN: dict[str, Kind] = {"<think>": "reasoning", "<tool_call>": "tool_call"}
_CLOSE = {"reasoning": "</think>", "tool_call": "</tool_call>"}
# JSON strings contain no line breaks, so an unclosed quote hides the end of a call only on its own line. A parser of
# partial JSON cannot tell whether a text ends inside a string: it drops an incomplete key and an incomplete pair alike.
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')


@dataclass(frozen=True)
class Delta:
    """A piece of a reply as it is decoded; for a tool call the raw text of its JSON, and the id of the call."""

    text: str
    kind: Kind = "text"
    call: str = ""


@dataclass(frozen=True)
class InvalidToolCall:
    """A call that is not a JSON object with a name and an object of arguments: its text, the error, and its id."""

    text: str
    error: str
    id: str = ""


@dataclass(frozen=True)
class Tags:
    """The delimiters of one tokenizer: by token id those that are tokens, the rest by text."""

    by_token: Mapping[int, str]
    by_text: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Tags:
        """Look up the delimiters in a vocabulary (slow for large ones: do it once)."""
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        tags = [*_OPEN, *_CLOSE.values()]
        by_token = {vocabulary[tag]: tag for tag in tags if tag in vocabulary}
        return cls(by_token, tuple(tag for tag in tags if tag not in vocabulary))


@dataclass(frozen=True)
class ParsedReply:
    """A finished reply, split into its parts."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    invalid_tool_calls: tuple[InvalidToolCall, ...]


class OutputParser:
    """Takes a reply's tokens and text as they arrive and returns deltas; at the end, the parsed reply."""

    def __init__(self, tags: Tags, seed: bytes, start: Kind = "text", *, json_text: bool = False) -> None:
        """Begin a reply.

        Args:
            tags: the tokenizer's delimiters.
            seed: makes the ids of calls, together with their position: `call_` and 24 hex digits.
            start: the block that the prompt left open (reasoning, where the template opens `<think>`).
            json_text: whether the text, if any, is JSON; what is inside its strings then opens no block.
        """
        self._tags = tags
        self._json_text = json_text
        self._seed = seed
        self._calls = 0
        self._kind: Kind = start
        self._regions: list[list[str]] = [[start, ""]]
        self._held = ""

    def push(self, token: int, text: str) -> list[Delta]:
        """Add a token and the text that it completes."""
        tag = self._tags.by_token.get(token)
        if tag is not None and self._may_switch(tag):
            head, _, tail = text.partition(tag)
            deltas = [*self._add(head), *self._flush()]
            self._switch(tag)
            return [*deltas, *self._add(tail)]
        return self._add(text)

    def finish(self) -> list[Delta]:
        """The text that was held back because a delimiter might have begun in it."""
        return self._flush()

    def parsed(self) -> ParsedReply:
        """The parsed reply; to be called after `finish`."""
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
        """Whether a delimiter at this position of the held text counts as one."""
        if not self._may_switch(tag) or self._kind == "reasoning":
            return self._may_switch(tag)
        region = self._regions[-1][1] + self._held[:at]
        if self._kind == "text":
            return not (self._json_text and region.strip())
        # With complete strings removed, a quote on the last line opens a string that contains the delimiter.
        return '"' not in _STRING.sub("", region).rpartition("\n")[2]

    def _next(self) -> tuple[int, str] | None:
        """The first delimiter that counts in the held text, and its position."""
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
        body = parse_json(text, parse_constant=_refuse)
        # JSON can spell half a surrogate pair, which no tokenizer accepts.
        json.dumps(body, ensure_ascii=False).encode()
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(body, dict) or not isinstance(body.get("name"), str):
        raise ValueError('expected a JSON object with a "name"')
    arguments = body.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError(f'"arguments" must be a JSON object; found {type(arguments).__name__}')
    return body["name"], arguments


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
