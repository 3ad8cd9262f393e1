"""What belongs to a subject, as one zip file that can be read without this package and brought back elsewhere.

    manifest.json        the format, whose, when, and the SHA-256 of every other file
    threads/N.json       a thread: its messages, each once, and its checkpoints, which refer to them
    states.safetensors   the matrices of every memory, by its digest
    states.json          the rest of every memory, by its digest
    facts.json           facts with their sources
    audit.json           the audit trails of the threads, to be read; they stay behind at an import
    rules.json           what the subject was said to own

Values that JSON cannot hold stand as msgpack, as the database holds them, in base64. Nothing in the file is executed.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import ZIP_DEFLATED, BadZipFile, ZipFile

import numpy as np
from langchain_core.messages import BaseMessage, message_to_dict, messages_from_dict
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.serde.base import SerializerProtocol
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from agentmem.errors import AgentMemError, StorageError
from agentmem.state import MemoryState
from agentmem.text import parse_json
from agentmem_governance.journal import now
from agentmem_governance.message_search import memory_in
from agentmem_governance.trail import Trail
from agentmem_sql import SQLAlchemySaver, TransferReport, copy_threads
from agentmem_sql.saver import plain_serde
from agentmem_sql.transfer import verbatim

if TYPE_CHECKING:
    from agentmem_chroma import Fact

FORMAT = 1
_TAGS = ("msgpack", "bytes", "bytearray", "null")  # of LangGraph's serializer; a pickle is not read
# What reading other files as an export raises.
_NO_EXPORT = (
    *(OSError, BadZipFile, LookupError, TypeError, ValueError, AttributeError),
    *(SafetensorError, RuntimeError, zlib.error),
)
_TEXT = ("chain", "tail")  # the fields of a memory that are bytes, but for its matrices


class Exported(NamedTuple):
    """What an export holds, or what an import brought back.

    Attributes:
        subject: whose.
        threads: how many threads.
        checkpoints: how many checkpoints; at an import, those that were not there yet.
        facts: how many facts.
        digest: SHA-256 of the manifest, hexadecimal.
    """

    subject: str
    threads: int
    checkpoints: int
    facts: int
    digest: str


def write_export(
    path: str | Path,
    saver: SQLAlchemySaver,
    subject: str,
    threads: Sequence[str],
    facts: Sequence[Fact],
    trails: Mapping[str, Trail],
    rules: Sequence[tuple[str, str]],
) -> Exported:
    """Write an export; a file of that name is replaced when the new one is complete.

    Raises:
        StorageError: stored data is damaged, or the database reports an error.
    """
    path, serde = Path(path), plain_serde(saver.serde)
    partial = path.with_name(path.name + ".part")
    digests: dict[str, str] = {}
    states: dict[str, MemoryState] = {}
    count = 0
    try:
        with ZipFile(partial, "w", ZIP_DEFLATED) as archive:

            def add(name: str, content: bytes) -> None:
                digests[name] = sha256(content).hexdigest()
                archive.writestr(name, content)

            for number, thread in enumerate(threads):
                data = _thread(saver, serde, thread, states)
                count += len(data["checkpoints"])
                add(f"threads/{number}.json", _json(data))
            tensors = {digest: np.array(state.matrices) for digest, state in states.items()}
            add("states.safetensors", save_tensors(tensors))
            add("states.json", _json({digest: _header(state) for digest, state in states.items()}))
            add("facts.json", _json([_fact(fact) for fact in facts]))
            audits = {
                thread: {
                    "head": trail.head,
                    "holds": trail.holds,
                    "entries": [each.to_dict() for each in trail.entries],
                }
                for thread, trail in trails.items()
                if trail.entries
            }
            add("audit.json", _json(audits))
            add("rules.json", _json([list(rule) for rule in rules]))
            manifest = _json({"format": FORMAT, "subject": subject, "time": now(), "files": digests})
            archive.writestr("manifest.json", manifest)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    return Exported(subject, len(threads), count, len(facts), sha256(manifest).hexdigest())


class Export:
    """An export that was read and whose digests are right.

    Attributes:
        subject: whose.
        facts: arguments of `Fact`, and its id.
        rules: kinds and values.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file.

        Raises:
            StorageError: it is no export, one of a newer version, or a part of it was changed or damaged.
        """
        try:
            with ZipFile(path) as archive:
                manifest = archive.read("manifest.json")
                read = parse_json(manifest)
                if read["format"] > FORMAT:
                    raise StorageError(
                        f"expected an export of format {FORMAT}, found {read['format']}; upgrade agentmem"
                    )
                files = {name: archive.read(name) for name in read["files"]}
            for name, content in files.items():
                if sha256(content).hexdigest() != read["files"][name]:
                    raise StorageError(f"expected {name} as the manifest of {path} says, found it changed or damaged")
            self.subject: str = read["subject"]
            self.digest = sha256(manifest).hexdigest()
            self.facts: list[dict[str, Any]] = [dict(fact.items()) for fact in parse_json(files["facts.json"])]
            self.rules: list[tuple[str, str]] = [
                (kind.encode().decode(), value.encode().decode()) for kind, value in parse_json(files["rules.json"])
            ]
            self._states = _states(parse_json(files["states.json"]), load_tensors(files["states.safetensors"]))
            self.threads = [parse_json(files[name]) for name in files if name.startswith("threads/")]
            self._names = [str(thread["thread"]) for thread in self.threads]
        except StorageError:
            raise
        except _NO_EXPORT as error:
            raise StorageError(
                f"expected an export of agentmem at {str(path)!r}, found something else: {error!r}"
            ) from error

    def into(self, target: SQLAlchemySaver) -> TransferReport:
        """Copy the threads into a database; what it has already is left alone.

        Raises:
            TransferError: a thread went on there in another way, see `copy_threads`.
            StorageError: the database reports an error.
        """
        source = _ExportSaver(self.threads, self._states, plain_serde(target.serde))
        return copy_threads(source, target, thread_ids=self._names)


class _ExportSaver(BaseCheckpointSaver[Any]):
    """The threads of an export, to be read as LangGraph's checkpointers are."""

    def __init__(
        self, threads: Sequence[Mapping[str, Any]], states: Mapping[str, MemoryState], serde: SerializerProtocol
    ) -> None:
        super().__init__(serde=serde)
        self._threads = {thread["thread"]: thread for thread in threads}
        self._states = states
        self._stored: dict[str, dict[tuple[str, str], CheckpointTuple]] = {}  # of the thread that was asked for last

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        at = config["configurable"]
        return self._checkpoints(at["thread_id"]).get((at.get("checkpoint_ns", ""), at["checkpoint_id"]))

    def list(self, config: RunnableConfig | None, **_options: Any) -> Iterator[CheckpointTuple]:
        assert config is not None
        yield from self._checkpoints(config["configurable"]["thread_id"]).values()

    def _checkpoints(self, name: str) -> dict[tuple[str, str], CheckpointTuple]:
        """The checkpoints of a thread, by namespace and id."""
        if name not in self._stored:
            made = self._made(self._threads[name])
            self._stored = {name: {_key(checkpoint.config): checkpoint for checkpoint in made}}
        return self._stored[name]

    def _made(self, thread: Mapping[str, Any]) -> Iterator[CheckpointTuple]:
        messages = {
            digest: messages_from_dict([data])[0] if "type" in data else self._value(data, {})
            for digest, data in thread["messages"].items()
        }
        for stored in thread["checkpoints"]:
            where = {"thread_id": thread["thread"], "checkpoint_ns": stored["ns"]}
            values = {name: self._value(value, messages) for name, value in stored["channels"].items()}
            parent = stored["parent"]
            yield CheckpointTuple(
                config={"configurable": {**where, "checkpoint_id": stored["id"]}},
                checkpoint=self._value(stored["checkpoint"], {}) | {"id": stored["id"], "channel_values": values},
                metadata=self._value(stored["metadata"], {}),
                parent_config=None if parent is None else {"configurable": {**where, "checkpoint_id": parent}},
                pending_writes=[
                    (task, channel, self._value(value, messages)) for task, channel, value in stored["writes"]
                ],
            )

    def _value(self, data: Mapping[str, Any], messages: Mapping[str, BaseMessage]) -> Any:
        """The inverse of `_plain`."""
        if "json" in data:
            return data["json"]
        if "state" in data:
            return self._states[data["state"]].to_dict()
        if "messages" in data:
            return [messages[digest] for digest in data["messages"]]
        tag, body = data["msgpack"]
        if tag not in _TAGS:
            raise StorageError(f"expected a value as msgpack in an export, found {str(tag)[:40]!r}, which is not read")
        return self.serde.loads_typed((tag, base64.b64decode(body)))


def _key(config: RunnableConfig) -> tuple[str, str]:
    return config["configurable"]["checkpoint_ns"], config["configurable"]["checkpoint_id"]


def _thread(
    saver: SQLAlchemySaver, serde: SerializerProtocol, thread: str, states: dict[str, MemoryState]
) -> dict[str, Any]:
    """A thread as plain data; its memories are added to `states`."""
    messages: dict[str, Any] = {}
    digests: dict[Any, str] = {}  # of messages by value, since each is in every later checkpoint

    def plain(value: Any, exact: Any) -> dict[str, Any]:
        return _plain(serde, value, exact, messages, digests, states)

    checkpoints = []
    of_thread: RunnableConfig = {"configurable": {"thread_id": thread}}
    # The same once more without making any type that is not LangGraph's, which this process may not know.
    exactly = verbatim(saver, saver.serde)
    for stored in saver.list(of_thread):
        exact = exactly.get_tuple(stored.config)
        if exact is None:  # it was pruned meanwhile
            continue
        at, parent = stored.config["configurable"], stored.parent_config
        own = {name: value for name, value in stored.checkpoint.items() if name not in ("id", "channel_values")}
        checkpoints.append(
            {
                "ns": at.get("checkpoint_ns", ""),
                "id": at["checkpoint_id"],
                "parent": None if parent is None else parent["configurable"]["checkpoint_id"],
                "metadata": plain(dict(stored.metadata), dict(exact.metadata)),
                "checkpoint": plain(own, own),
                "channels": {
                    name: plain(value, exact.checkpoint["channel_values"][name])
                    for name, value in stored.checkpoint["channel_values"].items()
                },
                "writes": [
                    [task, channel, plain(value, same)]
                    for (task, channel, value), (_, _, same) in zip(
                        stored.pending_writes or (), exact.pending_writes or (), strict=False
                    )
                ],
            }
        )
    return {"thread": thread, "messages": messages, "checkpoints": checkpoints}


def _plain(
    serde: SerializerProtocol,
    value: Any,
    exact: Any,
    messages: dict[str, Any],
    digests: dict[Any, str],
    states: dict[str, MemoryState],
) -> dict[str, Any]:
    """A value as plain data; messages and memories in it are added to the others. `exact`: the same, verbatim."""
    if (state := memory_in(value)) is not None:
        states[state.digest] = state
        return {"state": state.digest}
    if isinstance(value, list) and value and all(isinstance(each, BaseMessage) for each in value):
        for message in value:
            key = type(message), repr(vars(message))
            if key not in digests:
                data = message_to_dict(message)
                if not _is_json(data) or messages_from_dict([data])[0] != message:
                    data = _packed(serde, message)
                digests[key] = sha256(_json(data)).hexdigest()
                messages[digests[key]] = data
        return {"messages": [digests[type(message), repr(vars(message))] for message in value]}
    return {"json": exact} if _is_json(exact) else _packed(serde, exact)


def _packed(serde: SerializerProtocol, value: Any) -> dict[str, Any]:
    tag, body = serde.dumps_typed(value)
    return {"msgpack": [tag, base64.b64encode(body).decode()]}


def _is_json(value: Any) -> bool:
    """Whether JSON gives exactly this value back."""
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) is str and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return type(value) is list and all(map(_is_json, value))
    if type(value) is float:
        return value == value and abs(value) != float("inf")
    return value is None or type(value) in (str, int, bool)


def _header(state: MemoryState) -> dict[str, Any]:
    plain = state.to_dict()
    del plain["data"]
    return plain | {name: plain[name].hex() for name in _TEXT}


def _states(headers: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, MemoryState]:
    try:
        return {
            digest: MemoryState.from_dict(
                {
                    **header,
                    **{name: bytes.fromhex(header[name]) for name in _TEXT},
                    "data": np.ascontiguousarray(tensors[digest], dtype="<f4").tobytes(),
                }
            )
            for digest, header in headers.items()
        }
    except (AgentMemError, binascii.Error) as error:
        raise StorageError(f"a memory of the export is damaged: {error}") from error


def _fact(fact: Fact) -> dict[str, Any]:
    return {
        "id": fact.id,
        "text": fact.text,
        "source": fact.source,
        "thread": fact.thread,
        "time": fact.time.isoformat(),
        "metadata": dict(fact.metadata),
    }


def fact_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Fact` from an export."""
    given = {name: data[name] for name in ("text", "source", "thread", "metadata")}
    return {**given, "time": datetime.fromisoformat(data["time"])}


def _json(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, indent=1, sort_keys=True).encode("utf-8", "surrogatepass")
