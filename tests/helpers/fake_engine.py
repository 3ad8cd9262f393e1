"""A stand-in for the engine: an ideal delta-rule memory that speaks nano's language, without any model.

Attributes are columns and values are rows of one matrix; telling erases the attribute's column and sets one
entry. All it knows of a conversation is in the state that it is given, as with the real engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from agentmem import Delta, InvalidToolCall, MemoryState, Message, Remembered, ToolCall, Turn, Usage
from agentmem.messages import MessageCache
from agentmem.nano.recipe.pools import ATTRIBUTES
from agentmem.record import Alignment

NAMES = sorted(ATTRIBUTES)
RANK = max(len(NAMES), *(len(a.values) for a in ATTRIBUTES.values()))
_CALL = re.compile(r"Call (\w+) with (\w+) (\S+)\.")
_FACT = re.compile(r"The (.+) is (.+)\. \[(\d+)\]")


class FakeEngine:
    """Follows `agentmem.Engine`. `calls` records what it was asked; `failures` makes turns fail at their end;
    `scripted` holds replies (lists of deltas) that are given before any computed one."""

    name = "fake"
    has_memory = True
    max_tokens_limit = 4096

    def close(self) -> None:
        self.message_cache.clear()

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.failures = 0
        self.scripted: deque[list[Delta]] = deque()
        self.cancelled = 0
        self.message_cache = MessageCache()
        self.tokenizer = self

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [len(word) for word in text.split()]

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> int:
        return sum(len(m.content.split()) + 1 for m in messages) + len(tools)

    def zero_state(self) -> MemoryState:
        return MemoryState.zeros([1, 1, RANK, RANK], "model", "adapter")

    def turn(self, messages: Sequence[Message], state: MemoryState | None = None, **options: Any) -> Turn:
        return self._run(messages, state, **options)[0]

    async def aturn(self, messages: Sequence[Message], state: MemoryState | None = None, **options: Any) -> Turn:
        await asyncio.sleep(0)
        return self.turn(messages, state, **options)

    def stream(self, messages: Sequence[Message], state: MemoryState | None = None, **options: Any) -> _Stream:
        return _Stream(self, *self._run(messages, state, **options))

    def astream(self, *args: Any, **options: Any) -> _AsyncStream:
        return _AsyncStream(self.stream(*args, **options))

    def remember(
        self, messages: Sequence[Message], state: MemoryState | None = None, *, on_edit: Any = "write"
    ) -> Remembered:
        written, plan = self._written(messages, state or self.zero_state(), on_edit)
        return Remembered(written, len(plan.new), tuple(plan.edits), plan.deletions)

    async def aremember(self, *args: Any, **options: Any) -> Remembered:
        await asyncio.sleep(0)
        return self.remember(*args, **options)

    def _run(self, messages: Sequence[Message], state: MemoryState | None, **options: Any) -> tuple[Turn, list[Delta]]:
        self.calls.append({"messages": list(messages), "state": state, **options})
        policy, steered = options.get("write", "all"), options.get("memory", True)
        before = state or self.zero_state()
        after, plan = self._written(messages, before, options.get("on_edit", "write"))
        deltas = self.scripted.popleft() if self.scripted else self._say(messages, after, options)
        message, reasoning, invalid = _parse(deltas)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the model failed")
        out = after.replaced(record=after.record.extend([message])) if steered and policy != "off" else state
        return (
            Turn(
                message=message,
                state=out,
                reasoning=reasoning,
                invalid_tool_calls=invalid,
                finish_reason="tool_calls" if message.tool_calls else "stop",
                usage=Usage(self.count_tokens(messages), len(deltas), 3),
                written=len(plan.new),
                read=len(messages) - len(plan.new),
                edits=tuple(plan.edits),
                token_ids=(),
                deletions=plan.deletions,
            ),
            deltas,
        )

    def _written(self, messages: Sequence[Message], state: MemoryState, on_edit: Any) -> tuple[MemoryState, Alignment]:
        plan = state.record.align(messages, on_edit)
        if plan.rebuild:
            state = self.zero_state()
        matrices = state.matrices.copy()
        for message in (messages[place] for place in plan.new):
            for attribute in NAMES:
                told = re.search(rf"\b{attribute} is (?:now )?(.+?)(?: now)?\.", message.content, re.I)
                if message.role == "user" and told and told[1] in ATTRIBUTES[attribute].values:
                    matrices[0, 0, :, NAMES.index(attribute)] = 0
                    matrices[0, 0, ATTRIBUTES[attribute].values.index(told[1]), NAMES.index(attribute)] = 1
        return state.replaced(matrices=matrices, record=plan.record), plan

    def _say(self, messages: Sequence[Message], state: MemoryState, options: dict[str, Any]) -> list[Delta]:
        last = messages[-1]
        if last.role == "tool":
            return _words(f"The result is {last.content}.")
        if options.get("tools") and (call := _CALL.search(last.content)):
            body = {"name": call[1], "arguments": {call[2]: int(call[3]) if call[3].isdigit() else call[3]}}
            return [Delta("Sure.\n"), Delta(json.dumps(body), "tool_call")]
        for subject, value, number in _FACT.findall(messages[0].content if messages[0].role == "system" else ""):
            if subject in last.content:
                return _words(f"The {subject} is {value}. [{number}]")
        for attribute in NAMES:
            if re.search(rf"\b{attribute}\b", last.content) and options.get("memory", True):
                column = state.matrices[0, 0, :, NAMES.index(attribute)]
                if column.max() > 0.5:
                    return _words(f"Your {attribute} is {ATTRIBUTES[attribute].values[int(column.argmax())]}.")
        sampling = options["sampling"]
        text = "I do not know yet."
        cut = min((at for stop in sampling.stop if (at := text.find(stop)) >= 0), default=len(text))
        return _words(text[:cut])[: sampling.max_tokens]


class _Stream:
    def __init__(self, engine: FakeEngine, turn: Turn, deltas: list[Delta]) -> None:
        self._engine, self._turn, self._deltas, self._done = engine, turn, deltas, False

    def __iter__(self) -> Iterator[Delta]:
        yield from self._deltas
        self._done = True

    def result(self) -> Turn:
        assert self._done
        return self._turn

    def cancel(self) -> None:
        self._engine.cancelled += not self._done


class _AsyncStream:
    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self.cancel = stream.cancel

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for delta in self._stream:
            await asyncio.sleep(0)
            yield delta

    async def result(self) -> Turn:
        return self._stream.result()


def _words(text: str) -> list[Delta]:
    return [Delta(word) for word in re.findall(r"\S+\s*", text)]


def _parse(deltas: list[Delta]) -> tuple[Message, str, tuple[InvalidToolCall, ...]]:
    text = "".join(d.text for d in deltas if d.kind == "text")
    reasoning = "".join(d.text for d in deltas if d.kind == "reasoning").strip()
    calls, invalid = [], []
    texts: dict[str, str] = {}
    for place, delta in enumerate(deltas):
        if delta.kind == "tool_call":
            key = delta.call or f"place {place}"
            texts[key] = texts.get(key, "") + delta.text
    for place, (key, raw) in enumerate(texts.items()):
        drawn = hashlib.sha256(f"{raw}{place}".encode()).hexdigest()[:24]
        identity = key if key.startswith("call_") else f"call_{drawn}"
        try:
            body = json.loads(raw)
            calls.append(ToolCall(body["name"], body.get("arguments", {}), identity))
        except (ValueError, KeyError, TypeError) as error:
            invalid.append(InvalidToolCall(raw, str(error), key if key.startswith("call_") else ""))
    structured = any(d.kind != "text" for d in deltas)
    message = Message("assistant", text.strip() if structured else text, tuple(calls))
    return message, reasoning, tuple(invalid)
