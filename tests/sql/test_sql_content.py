"""Content is stored once, is verified when it is read, and goes with its thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from sql_cases import TABLES, config, memory, put
from sql_graphs import chat_graph, say

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver

Sql = Callable[..., list[Any]]


def test_unchanged_state_is_stored_once_over_fifty_turns(saver: SQLAlchemySaver, sql: Sql) -> None:
    graph = chat_graph(saver, fixed=True)
    for number in range(50):
        graph.invoke(say(f"turn {number}"), config())

    big = "SELECT count(*), sum(length(body)) FROM agentmem_blobs WHERE instr(body, 'matrices')"
    count, size = sql(big)[0]
    assert count == 1
    assert size < 9300
    assert sql("SELECT count(*) FROM agentmem_channels WHERE digest IS NOT NULL AND name = ?", b"memory") == [(50,)]
    assert sql("SELECT count(*) FROM agentmem_writes WHERE channel = ?", b"memory") == [(50,)]
    assert graph.get_state(config()).values["memory"] == memory(7)


def test_a_changing_state_is_stored_once_for_channel_and_write(saver: SQLAlchemySaver, sql: Sql) -> None:
    graph = chat_graph(saver)
    for number in range(10):
        graph.invoke(say(f"turn {number}"), config())
    assert sql("SELECT count(*) FROM agentmem_blobs WHERE instr(body, 'matrices')") == [(10,)]


def test_repeating_a_put_adds_no_row(saver: SQLAlchemySaver, sql: Sql) -> None:
    def rows() -> list[Any]:
        return [sql(f"SELECT count(*) FROM agentmem_{table}") for table in TABLES]

    made = saver.get_next_version(None, None)
    stored = {
        "v": 4,
        "id": "1",
        "ts": "",
        "channel_values": {"x": memory(1)},
        "channel_versions": {"x": made},
    }
    for _ in range(2):
        at = saver.put(config(), stored, {}, {"x": made})  # type: ignore[arg-type]
        saver.put_writes(at, [("x", memory(1))], "task")
    assert rows() == [[(1,)]] * 5


def test_bytes_lists_and_text_of_equal_content_stay_apart(saver: SQLAlchemySaver) -> None:
    values = {
        "bytes": b"a",
        "bytearray": bytearray(b"a"),
        "text": "a",
        "none": None,
        "empty": b"",
        "list": [],
    }
    found = saver.get_tuple(put(saver, config(), values))
    assert found is not None
    assert found.checkpoint["channel_values"] == values
    assert {name: type(value) for name, value in found.checkpoint["channel_values"].items()} == {
        name: type(value) for name, value in values.items()
    }


def test_delete_thread_leaves_nothing_of_it_and_all_of_the_others(saver: SQLAlchemySaver, sql: Sql) -> None:
    graph = chat_graph(saver)
    for thread in ("kept", "gone"):
        for _ in range(3):
            graph.invoke(say("same text"), config(thread))
    ((kept,),) = sql("SELECT number FROM agentmem_threads WHERE name = ?", b"kept")

    saver.delete_thread("gone")
    saver.delete_thread("never there")

    assert sql("SELECT name FROM agentmem_threads") == [(b"kept",)]
    for table in TABLES[1:]:
        assert sql(f"SELECT DISTINCT thread FROM agentmem_{table}") == [(kept,)]
    assert saver.get_tuple(config("gone")) is None
    assert graph.get_state(config("kept")).values["memory"] == memory(3)
    assert graph.invoke(say("again"), config("gone"))["messages"][-1].content == "answer 1"


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "kind"])
@pytest.mark.parametrize("pending", [False, True])
def test_damaged_content_is_refused(saver: SQLAlchemySaver, sql: Sql, damage: str, pending: bool) -> None:
    at = put(saver, config(), {} if pending else {"x": memory(1)})
    if pending:
        saver.put_writes(at, [("x", memory(1))], "task")
    assert saver.get_tuple(at) is not None
    sql(
        {
            "flip": "UPDATE agentmem_blobs SET body = "
            "CAST(substr(body, 1, 999) || x'00' || substr(body, 1001) AS BLOB)",
            "cut": "UPDATE agentmem_blobs SET body = substr(body, 1, length(body) - 1)",
            "lose": "DELETE FROM agentmem_blobs",
            "kind": "UPDATE agentmem_blobs SET kind = 1",
        }[damage]
    )
    with pytest.raises(StorageError, match="SHA-256"):
        saver.get_tuple(at)
    with pytest.raises(StorageError, match="SHA-256"):
        list(saver.list(config()))
    saver.delete_thread("t")
    assert saver.get_tuple(at) is None


@pytest.mark.parametrize("column", ["metadata", "body", "parent", "id"])
def test_damaged_checkpoint_row_is_refused(saver: SQLAlchemySaver, sql: Sql, column: str) -> None:
    put(saver, put(saver, config(), {"x": 1}), {"x": 1})
    sql(f"UPDATE agentmem_checkpoints SET {column} = CAST({column} || x'31' AS BLOB) WHERE parent IS NOT NULL")
    with pytest.raises(StorageError, match="row of checkpoint"):
        saver.get_tuple(config())


class Cipher:
    """Stands for a real one."""

    def encrypt(self, plaintext: bytes) -> tuple[str, bytes]:
        return "xor", bytes(byte ^ 0x55 for byte in plaintext)

    def decrypt(self, ciphername: str, ciphertext: bytes) -> bytes:
        assert ciphername == "xor"
        return bytes(byte ^ 0x55 for byte in ciphertext)


def test_an_encrypting_serializer_leaves_no_plain_value(url: str, path: Path) -> None:
    with SQLAlchemySaver.from_url(url, serde=EncryptedSerializer(Cipher(), JsonPlusSerializer())) as saver:
        at = put(saver, config(), {"x": "the secret"}, owner="the owner")
        saver.put_writes(at, [("x", "the secret too")], "task")
        found = saver.get_tuple(at)
        assert found is not None
        assert found.checkpoint["channel_values"] == {"x": "the secret"}
        assert [one.config for one in saver.list(None, filter={"owner": "the owner"})] == [at]
    assert b"the secret" not in path.read_bytes()
    assert b"the owner" not in path.read_bytes()


class Opaque:
    """Msgpack cannot hold it."""


def test_nothing_is_pickled_even_where_the_serializer_would(url: str, sql: Sql) -> None:
    with SQLAlchemySaver.from_url(url, serde=JsonPlusSerializer(pickle_fallback=True)) as saver:
        at = put(saver, config(), {"x": 1})
        with pytest.raises(StorageError, match="pickle"):
            put(saver, at, {"x": Opaque()})
        with pytest.raises(StorageError, match="pickle"):
            saver.put_writes(at, [("x", Opaque())], "task")
    assert sql("SELECT count(*) FROM agentmem_checkpoints") == [(1,)]
