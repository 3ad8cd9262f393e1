"""A conversation as two files in a directory: its messages as JSON, its memory as ``MemoryState`` bytes.

Nothing executable is written or read. The two belong together: the messages name the digest of the memory, and a pair
that does not match, or a file that is not what was written, is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from langchain_core.messages import AnyMessage, BaseMessage, messages_from_dict, messages_to_dict

from agentmem.errors import CorruptStateError
from agentmem.state import MemoryState

MEMORY_FILE = "memory.state"
MESSAGES_FILE = "messages.json"

_VERSION = 1


def save(directory: Path, messages: Sequence[AnyMessage], memory: MemoryState) -> None:
    """Write both files, each whole or not at all; the directory is made if it is not there.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    content = {"version": _VERSION, "memory": memory.digest, "messages": messages_to_dict(messages)}
    _replace(directory / MEMORY_FILE, memory.to_bytes())
    _replace(directory / MESSAGES_FILE, json.dumps(content, ensure_ascii=False, indent=2).encode())


def load(directory: Path) -> tuple[list[BaseMessage], MemoryState]:
    """Read both files.

    Raises:
        OSError: a file is missing or cannot be read.
        CorruptStateError: a file is not what ``save`` wrote, or the two are of different conversations.
    """
    memory = MemoryState.from_bytes((directory / MEMORY_FILE).read_bytes())
    file = directory / MESSAGES_FILE
    try:
        content = json.loads(file.read_bytes())
        version, digest = content["version"], content["memory"]
        messages = messages_from_dict(content["messages"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptStateError(f"{file} should hold saved messages; found something else ({error!r})") from error
    if version != _VERSION:
        raise CorruptStateError(f"{file} is of version {version!r}; this agentmem reads version {_VERSION}")
    if digest != memory.digest:
        raise CorruptStateError(
            f"{file} belongs to a memory with digest {digest}; {MEMORY_FILE} has {memory.digest}; save both anew"
        )
    return messages, memory


def _replace(file: Path, content: bytes) -> None:
    new = file.with_name(f"{file.name}.new")
    new.write_bytes(content)
    os.replace(new, file)
