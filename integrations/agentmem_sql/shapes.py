"""Reading messages that look like messages that were read before.

A serializer revives a message by importing its class and calling it, and pydantic looks at every field. For a
thread of a thousand messages that is most of the time that reading takes. What a message is made of, its class
and the types of its fields, is its shape. The first of a shape goes through the serializer. If that changes
nothing, the others of the shape whose lists and dictionaries are empty are made from their fields as they stand.
"""

from __future__ import annotations

from typing import Any

import ormsgpack
from langchain_core.messages import BaseMessage
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import EXT_PYDANTIC_V2, JsonPlusSerializer

from agentmem_sql.recall import Recalled

Shape = tuple[Any, ...]

_MOST = 1000  # shapes; there are hardly more than classes

# Where the bytes of an extension type of msgpack begin, by its first byte: those of 1 to 16 bytes are no messages.
_TAG = b"msgpack\0"
_HEADERS = {_TAG + bytes((first,)): len(_TAG) + length for first, length in ((0xC7, 3), (0xC8, 4), (0xC9, 6))}


def reads_as_written(serde: SerializerProtocol) -> bool:
    """Whether a serializer is LangGraph's own with nothing of the caller's in it, so that messages hold no surprise."""
    return type(serde) is JsonPlusSerializer and not getattr(serde, "_custom_unpack_ext_hook", True)


class Shapes:
    """The shapes that one serializer is known to leave as they are."""

    def __init__(self) -> None:
        self._known: dict[Shape, Recalled | None] = {}

    def revive(self, body: bytes, digest: bytes) -> tuple[BaseMessage, Recalled] | None:
        """The message that a value is, and what it looks like, if its shape is known."""
        spelled = _spelled(body)
        if spelled is None:
            return None
        like = self._known.get(spelled[0])
        return None if like is None else like.like(digest, spelled[1], len(body))

    def learn(self, body: bytes, message: BaseMessage, snapshot: Recalled) -> None:
        """See what the serializer made of a value whose shape is not known."""
        spelled = _spelled(body)
        if spelled is None or spelled[0] in self._known or len(self._known) >= _MOST:
            return
        shape, fields = spelled
        plain = isinstance(snapshot.fields, dict) and list(message.__dict__.items()) == list(fields.items())
        if plain or not any(fields[name] for name in fields if type(fields[name]) in (list, dict)):
            self._known[shape] = snapshot if plain else None


def _spelled(body: bytes) -> tuple[Shape, dict[str, Any]] | None:
    """Shape and fields of a value that is one object of the kind that messages are."""
    start = _HEADERS.get(body[: len(_TAG) + 1])
    if start is None or body[start - 1] != EXT_PYDANTIC_V2:
        return None
    try:
        module, name, fields, method = ormsgpack.unpackb(body[start:])
    except ValueError:  # an object within: not as plain as that
        return None
    return (module, name, method, *fields, *map(type, fields.values())), fields
