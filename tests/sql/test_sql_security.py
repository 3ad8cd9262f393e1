"""Whatever users send is data, in filters and in ids; and nothing that can run code is stored or read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from agentmem.errors import ConfigError, StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.list_tree import VALUE
from agentmem_sql.rows import pack_content, seal_checkpoint
from tests.helpers.sql_cases import checkpoint, config, put
from tests.helpers.sql_protection import PROTECTION, aes

Sql = Callable[..., list[Any]]

PAYLOADS = [
    "' OR 1=1 --",
    "x') OR 1=1 --",
    "') UNION SELECT 1,2,3,4,5,6,7,8,9,10,11 --",
    '$."x"',
    "$.source",
    "$",
    "a.b",
    "a[0]",
    "",
    '"',
    "'",
    "\\",
    "a\0b",
    "😀",
    "%",
    "_",
    ":key",
    "%(key)s",
    "?",
    "{}",
    "ключ",
    "source",
    "; DROP TABLE agentmem_blobs; --",
]


def test_filters_are_data_on_every_database(any_saver: SQLAlchemySaver) -> None:
    """The injections of CVE-2025-67644 and the like: keys and values match exactly, and nothing else."""
    plain = put(any_saver, config("plain"), {"x": 1})
    stored: dict[str, RunnableConfig] = {}
    for number, payload in enumerate(PAYLOADS):
        metadata = {payload: f"value {number}", "note": payload, "deep": {"a": {payload: [payload]}}}
        made = checkpoint({"x": payload})
        stored[payload] = any_saver.put(config(f"{number}"), made, metadata, made["channel_versions"])  # type: ignore[arg-type]

    def found(**wanted: Any) -> list[RunnableConfig]:
        return [one.config for one in any_saver.list(None, filter=wanted)]

    for number, payload in enumerate(PAYLOADS):
        at = [stored[payload]]
        assert found(**{payload: f"value {number}"}) == at
        assert found(note=payload) == at if payload.isprintable() else True
        assert found(deep={"a": {payload: [payload]}}) == at
        for wrong in (None, "", "value", f"value {number}' OR 1=1 --", [f"value {number}"], number, True):
            assert found(**{payload: wrong}) == []
        if payload not in ("source", "step"):
            assert found(**{payload + " ": f"value {number}"}) == []
    assert found(source="loop") == [plain]
    assert len(found()) == len(PAYLOADS) + 1


def test_ids_are_data_on_every_database(any_saver: SQLAlchemySaver) -> None:
    """Thread ids, namespaces, checkpoint ids, task ids and channels; and what is asked with them."""
    stored = {}
    for payload in PAYLOADS:
        made = {**checkpoint({payload: payload, "x": 1}), "id": payload or "empty"}
        at = any_saver.put(config(payload, ns=payload), made, {"run_id": payload}, made["channel_versions"])
        any_saver.put_writes(at, [(payload, payload.encode())], payload, payload)
        stored[payload] = at
    for payload, at in stored.items():
        found = any_saver.get_tuple(config(payload, ns=payload))
        assert found is not None
        assert found == any_saver.get_tuple(at)
        assert found.checkpoint["channel_values"] == {payload: payload, "x": 1}
        assert found.pending_writes == [(payload, payload, payload.encode())]
        assert [one.config for one in any_saver.list({"configurable": {"thread_id": payload}})] == [at]
        before = [one.config for one in any_saver.list(None, before=config(checkpoint_id=payload or "\0"))]
        assert all(one["configurable"]["checkpoint_id"].encode() < payload.encode() for one in before)
        assert any_saver.get_tuple(config(payload, ns=payload + " ")) is None
        assert any_saver.get_tuple(config(payload + "'", ns=payload)) is None
        assert payload in dict(any_saver.get_delta_channel_history(config=at, channels=[payload]))
    any_saver.delete_for_runs(["' OR 1=1 --"])
    any_saver.delete_thread("%")
    any_saver.prune(["_", "?"], strategy="delete")
    any_saver.copy_thread("'", "' copy")
    gone = {"' OR 1=1 --", "%", "_", "?"}
    left = {one.config["configurable"]["thread_id"] for one in any_saver.list(None)}
    assert left == (set(PAYLOADS) - gone) | {"' copy"}


@pytest.mark.parametrize("prefix", ['odd "name"; -- %s :x ', "Ünïcode `tick` ? ", "%s", "%(x)s_"])
def test_odd_table_prefixes_are_quoted(database_url: str, prefix: str) -> None:
    with SQLAlchemySaver.from_url(database_url, table_prefix=prefix) as saver:
        at = put(saver, put(saver, config(), {"x": [1, "two"]}), {"x": [1, "two", 3]}, run_id="r")
        saver.put_writes(at, [("x", 1)], "task")
        saver.prune(["t"])
        saver.copy_thread("t", "copy")
        assert saver.storage_report().checkpoints > 0
        saver.delete_for_runs(["r"])
        assert list(saver.list(None)) == []
    with SQLAlchemySaver.from_url(database_url, table_prefix=prefix) as again:
        put(again, config(), {"x": 1})
    with SQLAlchemySaver.from_url(database_url) as other:
        assert other.get_tuple(config()) is None


@pytest.mark.parametrize("prefix", ["x" * 60, "a\0b", None])
def test_table_prefixes_that_no_name_has_are_refused(url: str, prefix: Any) -> None:
    with pytest.raises(ConfigError, match="table_prefix"):
        SQLAlchemySaver.from_url(url, table_prefix=prefix)


# Pickles.


class Opaque:
    """Msgpack cannot hold it."""


class Loud:
    """Says so when something unpickles it."""

    def __reduce__(self) -> Any:
        return logging.getLogger("unpickled").error, ("unpickled",)


def test_nothing_is_pickled_even_where_the_serializer_would(url: str, sql: Sql) -> None:
    tables = ("threads", "blobs", "checkpoints", "writes")
    with SQLAlchemySaver.from_url(url, serde=JsonPlusSerializer(pickle_fallback=True)) as saver:
        at = put(saver, config(), {"x": 1})
        before = [sql(f"SELECT * FROM agentmem_{table}") for table in tables]
        for value in (Opaque(), [Opaque()], ["x", Opaque()], {"a": Opaque()}, HumanMessage("x", id="1", note=Opaque())):
            with pytest.raises(StorageError, match="pickle"):
                put(saver, at, {"y": "good", "x": value})
            with pytest.raises(StorageError, match="pickle"):
                saver.put_writes(at, [("y", "good"), ("x", value)], "task")
        with pytest.raises(StorageError, match="pickle"):
            put(saver, at, {"x": 1}, note=Opaque())
    assert [sql(f"SELECT * FROM agentmem_{table}") for table in tables] == before


@pytest.mark.parametrize("protection", PROTECTION)
def test_a_pickle_that_someone_stored_is_not_read(url: str, protection: str, caplog: pytest.LogCaptureFixture) -> None:
    """By someone with all the keys, or before there was a rule against it."""
    trusting = JsonPlusSerializer(pickle_fallback=True)
    tag, pickled = trusting.dumps_typed(Loud())
    assert tag == "pickle"
    trusting.loads_typed((tag, pickled))
    assert "unpickled" in caplog.text
    caplog.clear()
    serde = aes(serde=trusting) if "serde" in PROTECTION[protection] else trusting
    options = {**PROTECTION[protection], "serde": serde}
    with SQLAlchemySaver.from_url(url, **options) as saver:
        at = put(saver, config(), {"x": ["item", "y" * 100]})
        protection = saver._store.protection
        body = b"pickle\0" + pickled

        def plant(connection: Any) -> None:
            rows = connection.exec_driver_sql("SELECT thread, content FROM agentmem_checkpoints").all()
            ((thread, _),) = rows
            digest = protection.digest(VALUE, body)
            connection.exec_driver_sql(
                "INSERT INTO agentmem_blobs (thread, digest, kind, body) VALUES (?, ?, ?, ?)",
                (thread, digest, VALUE, protection.encrypt(body)),
            )
            row = dict(connection.exec_driver_sql("SELECT * FROM agentmem_checkpoints").mappings().one())
            row["content"] = pack_content({"x": digest})
            connection.exec_driver_sql(
                "UPDATE agentmem_checkpoints SET content = ?, seal = ?",
                (row["content"], seal_checkpoint(protection, "t", row)),
            )

        saver._store.database.run(plant, write=True)
        with pytest.raises(StorageError, match="pickle"):
            saver.get_tuple(at)
        with pytest.raises(StorageError, match="pickle"):
            list(saver.list(None))
    assert "unpickled" not in caplog.text
