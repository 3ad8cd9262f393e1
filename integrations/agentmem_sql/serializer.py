"""The serializer that a saver has where none is given: LangGraph's own, but rows of a database run no code.

LangGraph's default imports and calls whatever a stored value names. Here a value that names a type outside of
LangGraph's list of safe ones is made only if the type is of a kind that LangGraph stores, and loaded already; otherwise
an error says how to allow it. (LangGraph's strict mode gives the data of such a value in its place.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import is_dataclass
from enum import Enum
from pathlib import PurePath
from threading import local
from typing import Any, TypeGuard

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer, _create_msgpack_ext_hook
from langgraph.store.base import Item

from agentmem.errors import StorageError

_KINDS = Enum, PurePath, Item, set, frozenset
# Of pydantic's models and secrets, attrs' and named tuples: what LangGraph knows them by.
_MARKS = "model_fields", "__fields__", "get_secret_value", "_asdict"
_refused = local()


class CheckedSerializer(JsonPlusSerializer):
    """LangGraph's serializer that makes only what it may have stored."""

    def __init__(self, allowed: Iterable[tuple[str, ...] | type] = ()) -> None:
        """`allowed`: types that may be imported, too."""
        super().__init__()
        self._named = {(each.__module__, each.__name__) if isinstance(each, type) else tuple(each) for each in allowed}
        # It asks only whether a module and a name are in this.
        self._unpack_ext_hook = _create_msgpack_ext_hook(self)  # type: ignore[arg-type]

    def __contains__(self, key: tuple[str, str]) -> bool:
        module, name = key
        if key in self._named:
            return True
        if module in sys.modules:
            kind = getattr(sys.modules[module], name, None)
            if kind is None:  # what is not there cannot be called: LangGraph gives its data
                return True
            if isinstance(kind, type) and (
                is_dataclass(kind) or issubclass(kind, _KINDS) or any(hasattr(kind, mark) for mark in _MARKS)
            ):
                return True
        _refused.key = key
        return False

    def with_msgpack_allowlist(self, extra_allowlist: Iterable[tuple[str, ...] | type]) -> CheckedSerializer:
        """A serializer that may import these types, too."""
        return CheckedSerializer([*self._named, *extra_allowlist])

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """The value.

        Raises:
            StorageError: it names a type that is not allowed.
        """
        _refused.key = None
        value = super().loads_typed(data)
        if _refused.key is not None:
            module, name = _refused.key
            raise StorageError(
                f"a stored value names {module}.{name}, which is no loaded type of a kind that LangGraph stores "
                "(pydantic models, dataclasses, named tuples, enums), and may run code; if it is yours, import its "
                f"module first, or pass serde=JsonPlusSerializer(allowed_msgpack_modules=[({module!r}, {name!r})])"
            )
        return value


def is_langgraphs(serde: SerializerProtocol) -> TypeGuard[JsonPlusSerializer]:
    """Whether a serializer stores and reads values as LangGraph's default does, and does nothing of the caller's."""
    return type(serde) in (JsonPlusSerializer, CheckedSerializer)
