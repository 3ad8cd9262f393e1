"""How the messages of a request continue a thread.

Some clients send the whole conversation with every request, some only what is new, some what they have not trimmed yet.
A thread holds every message, so which of them it is can be told from the messages. They are compared by the digest that
a memory recognises them by: role, text, calls and the call that a result answers; system messages do not take part.

1. Without an assistant's message, everything is new: it is appended.
2. Beginning with the end of the thread, at the latest with its last reply: what follows is appended. A request that
   begins with the whole thread is the usual case of this.
3. With nothing in common with the thread: it is appended.
4. Otherwise it is another version of the conversation: a reply that is to be made again, an edited message, a summary
   in place of older messages. The thread goes back to the last checkpoint that the version begins with and continues
   from there, memory included. If there is none within reach, the version is the conversation from now on, and the
   memory's own record tells which of its messages are new (docs/concepts/memory.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from uuid import uuid4

from langchain_core.messages import AIMessage, BaseMessage, SystemMessage

from agentmem_langgraph.messages import to_engine


def without_system(messages: Iterable[BaseMessage]) -> tuple[str, list[BaseMessage]]:
    """The text of all system messages, and the other messages: those that a thread holds."""
    systems, others = list[str](), list[BaseMessage]()
    for message in messages:
        if isinstance(message, SystemMessage):
            systems.append(message.text)
        else:
            others.append(message)
    return "\n\n".join(filter(None, systems)), others


def continued(stored: Sequence[BaseMessage], sent: Sequence[BaseMessage]) -> list[BaseMessage] | None:
    """The conversation if `sent` continues `stored`; None where it is another version of it."""
    if not stored or not any(isinstance(message, AIMessage) for message in sent):
        return [*stored, *sent]
    before, now = _digests(stored), _digests(sent)
    for start, digest in enumerate(before):
        size = len(before) - start
        if digest == now[0] and before[start:] == now[:size]:
            return [*stored, *sent[size:]]
    return [*stored, *sent] if set(before).isdisjoint(now) else None


def begins_with(sent: Sequence[BaseMessage], stored: Sequence[BaseMessage]) -> bool:
    """Whether these messages begin with those of a checkpoint that has any."""
    return 0 < len(stored) <= len(sent) and _digests(sent[: len(stored)]) == _digests(stored)


def with_ids(messages: Sequence[BaseMessage], stored: Sequence[BaseMessage] = ()) -> list[BaseMessage]:
    """The messages, each with an id: that of an equal one of `stored`, its own, or a new one."""
    known: defaultdict[bytes, list[BaseMessage]] = defaultdict(list)
    for digest, message in zip(_digests(stored), stored, strict=True):
        known[digest].append(message)
    named = []
    for digest, message in zip(_digests(messages) if stored else [b""] * len(messages), messages, strict=True):
        if known[digest]:
            named.append(known[digest].pop(0))
        else:
            named.append(message if message.id else message.model_copy(update={"id": f"msg_{uuid4().hex}"}))
    return named


def _digests(messages: Sequence[BaseMessage]) -> list[bytes]:
    return [message.digest() for message in to_engine(messages)]
