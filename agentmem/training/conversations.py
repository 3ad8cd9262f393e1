"""Conversations to train a memory on: their type, and reading them from a JSONL file.

A conversation is messages, which of them count in the loss, and questions to ask after all of them. A file has one JSON
object per line, in the form that OpenAI's API and most training tools use, with two optional keys on a message:

    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!", "train": true}, ...]}
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from agentmem.errors import ConfigError, DataError, TranscriptError
from agentmem.messages import Message, Role, ToolCall
from agentmem.text import parse_json

T = TypeVar("T")
_SHOWN = 5  # bad lines that an error lists
_KEYS = ("train", "write")
_ROLES: dict[object, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_MESSAGE_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", *_KEYS}
_TEXT_TYPES = {"text", "input_text", "output_text"}


@dataclass(frozen=True)
class Ask:
    """A question asked after all messages of a conversation, apart from the others; its reply counts in the loss.

    Attributes:
        messages: what is asked; usually one user message.
        reply: the reply to learn.
        values: texts of which a right reply contains at least one. Empty: a reply is judged by `check`, or where there
            is none by its loss only.
        forbidden: texts that a right reply does not contain, such as an old value.
        kind: what the question is about: "ask", "choice", "never_told", "rule_followed", "tool_call" or free text.
        tools: the tools on offer, in OpenAI's form.
        check: whether the text of a reply is right, where no list of values can say it: a rule is followed, or the
            reply says that something was not told.
        decisive: texts of the reply that count in full in the loss beside its values: the words that stand in a
            value's place where there is none.
    """

    messages: tuple[Message, ...]
    reply: Message
    values: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    kind: str = ""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    check: Callable[[str], bool] | None = None
    decisive: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Messages in order, with which of them count in the loss.

    Attributes:
        messages: the messages; `Message.write` is False for those that memory must not take in.
        train: for each message, whether predicting its tokens counts in the loss. True for assistant messages only.
        tools: the tools on offer throughout, in OpenAI's form.
        asks: questions after all messages, each apart from the others. Rows of a file have none.
        origin: where it comes from, for messages to the user: "chats.jsonl:12", "facts:3".

    Raises:
        ConfigError: `train` has another length than `messages`, or is True for a message that is not the assistant's.
    """

    messages: tuple[Message, ...]
    train: tuple[bool, ...]
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    asks: tuple[Ask, ...] = ()
    origin: str = ""

    def __post_init__(self) -> None:
        if len(self.train) != len(self.messages):
            raise ConfigError(
                f"{self.origin or 'a conversation'}: `train` says for each of {len(self.messages)} messages whether it "
                f"counts; found {len(self.train)} values"
            )
        for message, counts in zip(self.messages, self.train, strict=True):
            if counts and message.role != "assistant":
                raise ConfigError(
                    f"{self.origin or 'a conversation'}: only assistant messages count in the loss; found "
                    f"a {message.role} message that does"
                )


class HeldConversations:
    """The part of a source that all sources share which hold their conversations: training and held-out ones."""

    def __init__(self, train: Sequence[Conversation], held_out: Sequence[Conversation]) -> None:
        self._train, self._held_out = tuple(train), tuple(held_out)

    def __len__(self) -> int:
        return len(self._train)

    def conversation(self, number: int) -> Conversation:
        """Training conversation `number`, from 0."""
        return self._train[number]

    def held_out(self, count: int) -> tuple[Conversation, ...]:
        """`count` held-out conversations, or all if there are fewer."""
        return self._held_out[:count]


@dataclass(frozen=True)
class BadLine:
    """A line that is no conversation to train on: its number, from 1, and why."""

    number: int
    reason: str


@dataclass(frozen=True)
class SourceFile:
    """A file that training reads, as it lies on the disk: its SHA-256 in hexadecimal digits, its size in bytes."""

    path: Path
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Conversations:
    """What a file holds.

    Attributes:
        good: the conversations, in the file's order.
        bad: the lines that are left out.
        ignored: how often each key occurred that has no meaning here, such as "message.weight" or "row.id".
        file: the file itself.
    """

    good: tuple[Conversation, ...]
    bad: tuple[BadLine, ...]
    ignored: Mapping[str, int]
    file: SourceFile


def read_conversations(path: str | Path, *, max_bad: float = 0.05) -> Conversations:
    """Read a JSONL file of conversations; it may be compressed (`.gz`, `.xz`).

    A message has `role` (system, developer, user, assistant, tool) and `content` (text, text blocks, or null), and
    where they apply `tool_calls`, `tool_call_id` and `name`. `train` says whether an assistant message counts in the
    loss; by default those after the first turn do, because before it there is nothing to remember. `write: false` keeps
    a message out of memory. A row may have `tools`. Empty lines are skipped.

    Args:
        path: the file.
        max_bad: the largest share of bad lines, from 0 to 1.

    Raises:
        ConfigError: `max_bad` is no share.
        DataError: the file cannot be read, is not JSONL, has no good line, or too many bad ones; the first are listed.
    """
    ignored = Counter[str]()
    rows = read_rows(path, lambda row, origin: _conversation(row, origin, ignored), max_bad=max_bad)
    return Conversations(rows.good, rows.bad, dict(ignored), rows.file)


@dataclass(frozen=True)
class Rows(Generic[T]):
    """What `read_rows` makes of a file; `good` and `bad` are in the file's order."""

    good: tuple[T, ...]
    bad: tuple[BadLine, ...]
    file: SourceFile


def read_rows(path: str | Path, parse: Callable[[object, str], T], *, max_bad: float = 0.05) -> Rows[T]:
    """Read a JSONL file whose lines may be bad; it may be compressed (`.gz`, `.xz`). Empty lines are skipped.

    Args:
        path: the file.
        parse: makes something of a line's value; its second argument says where the line is ("chats.jsonl:12"). A
            `BadRow`, `TranscriptError` or `ConfigError` that it raises makes the line a bad one.
        max_bad: the largest share of bad lines, from 0 to 1.

    Raises:
        ConfigError: `max_bad` is no share.
        DataError: the file cannot be read, is not JSONL, has no good line, or too many bad ones; the first are listed.
    """
    if not 0 <= max_bad <= 1:
        raise ConfigError(f"max_bad is a share of lines from 0 to 1; found {max_bad}")
    path = Path(path)
    file, content = read_file(path)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[0].lstrip()[:1] == b"[":
        raise DataError(
            f"{path} must have one JSON object per line; it begins with '[', as a JSON array does; write each of its "
            "elements on a line of its own (jq -c '.[]' FILE)"
        )
    good, bad = list[T](), list[BadLine]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            good.append(parse(parse_json(line), f"{path.name}:{number}"))
        except (BadRow, TranscriptError, ConfigError) as error:
            bad.append(BadLine(number, str(error)))
        except UnicodeDecodeError as error:
            bad.append(BadLine(number, f"not valid UTF-8 at byte {error.start}"))
        except ValueError as error:
            bad.append(BadLine(number, f"not JSON: {error}"))
    if not good or len(bad) > max_bad * (len(good) + len(bad)):
        raise DataError(_refusal(path, len(good), bad, max_bad))
    return Rows(tuple(good), tuple(bad), file)


def _refusal(path: Path, good: int, bad: Sequence[BadLine], max_bad: float) -> str:
    if not good and not bad:
        return f"{path} must have one conversation per line; it is empty"
    shown = "".join(f"\n  line {line.number}: {line.reason}" for line in bad[:_SHOWN])
    more = f"\n  and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
    return (
        f"{path}: {len(bad):,} of {good + len(bad):,} lines cannot be used, of which {max_bad:.0%} are allowed; mend "
        f"them, or allow more (max_bad):{shown}{more}"
    )


def read_file(path: Path) -> tuple[SourceFile, bytes]:
    """A data file and its content, decompressed if its name ends in `.xz` or `.gz`.

    Raises:
        DataError: it cannot be read, is not compressed in the way that its name says, or is cut off.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give the path of a file that exists") from error
    file = SourceFile(path, hashlib.sha256(raw).hexdigest(), len(raw))
    try:
        if path.suffix == ".xz":
            return file, lzma.decompress(raw)
        return file, gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is no whole {path.suffix} file ({error}); fetch or make it again") from error


# One row.


class BadRow(Exception):
    """Why a row cannot be used."""


def _conversation(row: object, origin: str, ignored: Counter[str]) -> Conversation:
    if not isinstance(row, dict):
        raise BadRow(f"a row is a JSON object with `messages`; found {_type(row)}")
    listed = row.get("messages")
    if not isinstance(listed, list) or not listed:
        hint = "; convert ShareGPT's `conversations` to `messages` first" if "conversations" in row else ""
        raise BadRow(f"`messages` is a list with at least one message; found {_type(listed)}{hint}")
    tools = row.get("tools") or ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("`tools` is a list of objects")
    unknown = [f"row.{key}" for key in row if key not in ("messages", "tools")]
    messages, train, users = list[Message](), list[bool](), 0
    for number, plain in enumerate(listed, 1):
        try:
            message = parse_message(plain)
            users += message.role == "user"
            messages.append(message)
            train.append(_flag(plain, "train", default=message.role == "assistant" and users > 1))
            if train[-1] and message.role != "assistant":
                raise BadRow("`train` is true, but only assistant messages count in the loss")
        except (BadRow, TranscriptError) as error:
            raise BadRow(f"message {number}: {error}") from None
        unknown += [f"message.{key}" for key in plain if key not in _MESSAGE_KEYS]
    if not any(train):
        raise BadRow(
            "no reply counts in the loss: without `train` only replies after the first turn do, since before it there "
            "is nothing to remember"
        )
    ignored.update(unknown)
    return Conversation(tuple(messages), tuple(train), tuple(tools), origin=origin)


def parse_message(plain: object) -> Message:
    """A message of a row.

    Raises:
        BadRow, TranscriptError: it has another form.
    """
    if not isinstance(plain, dict):
        raise BadRow(f"a message is an object with `role` and `content`; found {_type(plain)}")
    for key in plain:
        # A misspelt key would train or write the opposite of what was meant, so it must not be ignored.
        if key not in _MESSAGE_KEYS and (near := difflib.get_close_matches(key.lower(), _KEYS, cutoff=0.75)):
            raise BadRow(f"unknown key {key!r}; did you mean {near[0]!r}?")
    role = plain.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow(f"`role` is one of {', '.join(str(name) for name in _ROLES)}; found {role!r}")
    calls = plain.get("tool_calls") or ()
    if not isinstance(calls, list | tuple):
        raise BadRow(f"`tool_calls` is a list; found {_type(calls)}")
    if calls and role != "assistant":
        raise BadRow(f"only assistant messages have `tool_calls`; found some on a {role} message")
    content = _text(plain.get("content"))
    if not content and not calls and role != "tool":
        raise BadRow(f"a {role} message without text" + (" or tool calls" if role == "assistant" else ""))
    return Message(
        _ROLES[role],
        content,
        tuple(_tool_call(call) for call in calls),
        _string(plain, "tool_call_id"),
        _string(plain, "name"),
        _flag(plain, "write", default=True),
    )


def _text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"`content` is text, a list of text blocks or null; found {_type(content)}")
    return "".join(_blocks(content))


def _blocks(content: list[object]) -> Iterator[str]:
    for block in content:
        if isinstance(block, str):
            yield block
            continue
        kind = block.get("type") if isinstance(block, dict) else _type(block)
        text = block.get("text") if isinstance(block, dict) else None
        if kind not in _TEXT_TYPES or not isinstance(text, str):
            raise BadRow(f"a text model reads text blocks only; found a block of type {kind!r}")
        yield text


def _tool_call(call: object) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow('a tool call is {"id": ..., "function": {"name": ..., "arguments": ...}}; found another form')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):  # the API's form; some tools store the object itself
        try:
            arguments = parse_json(arguments)
        except ValueError:
            raise BadRow(f"the arguments of a tool call are not JSON: {arguments[:60]!r}") from None
    if not isinstance(arguments, dict):
        raise BadRow(f"the arguments of a tool call are an object; found {_type(arguments)}")
    return ToolCall(function["name"], arguments, _string(call, "id"))


def _flag(plain: Mapping[str, object], key: str, *, default: bool) -> bool:
    value = plain.get(key, default)
    if not isinstance(value, bool):
        raise BadRow(f"`{key}` is true or false; found {value!r}")
    return value


def _string(plain: Mapping[str, object], key: str) -> str:
    value = plain.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow(f"`{key}` is text; found {_type(value)}")
    return value or ""


def _type(value: object) -> str:
    """A JSON value's type as JSON calls it."""
    if value is None:
        return "nothing"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
