"""What was changed, damaged or planted behind the saver's back is refused: never another state."""

from __future__ import annotations

import json
import logging
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, NamedTuple

import ormsgpack
import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from pydantic import BaseModel, SecretStr

from agentmem.errors import ConfigError, StorageError
from agentmem_sql import SQLAlchemySaver, metadata
from agentmem_sql.content import CheckedSerializer, load
from agentmem_sql.list_tree import WITNESS
from agentmem_sql.protection import Protection
from agentmem_sql.rows import seal_write
from tests.helpers.sql_cases import Sql, checkpoint, config, put, read
from tests.helpers.sql_chains import all_rows, id_of
from tests.helpers.sql_protection import (
    HMAC_KEY,
    NEWEST,
    OLDER,
    PROTECTION,
    WRITE,
    Change,
    Filled,
    aes,
    exchange,
    forge,
    make_filled,
    of,
    parts,
    update,
)
from tests.helpers.sql_values import spelled

# Columns by which rows are found. A row whose key is changed is as good as deleted, which nothing can tell from one
# that was never there: it may be missing from what is read, but what is read is right.
KEYS = {
    "threads": ("number", "key"),
    "blobs": ("thread", "digest"),
    "checkpoints": ("thread", "ns", "id"),
    "writes": ("thread", "ns", "checkpoint", "task", "idx"),
    "settings": ("name",),
}
KEY_COLUMNS = [(table, column) for table, columns in KEYS.items() for column in columns]
# All other columns but the epoch, which says only when a cache is void.
OTHER_COLUMNS = [
    (name, column.name)
    for table in metadata(prefix="").sorted_tables
    if (name := table.name) in KEYS
    for column in table.columns
    if column.name not in (*KEYS[name], "epoch")
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Filled]:
    """A database with some of everything, by how it is protected."""
    return cache(lambda protection: make_filled(tmp_path_factory.mktemp("filled") / "threads.db", protection))


def flipped(value: bytes | int, random: Random) -> bytes | int:
    """A value with one bit changed."""
    if isinstance(value, int):
        return value ^ 1 << random.randrange(3, 6)
    place, bit = random.randrange(len(value)), random.randrange(8)
    return bytes(byte ^ (1 << bit if number == place else 0) for number, byte in enumerate(value))


def damages(filled: Filled, table: str, column: str, *, each: int) -> Iterator[dict[str, Any]]:
    """The answers after one bit of a column was changed, for some rows."""
    random = Random(f"{table}.{column}")
    rows = filled.rows(table, column)
    assert rows
    random.shuffle(rows)
    for number, value in rows[: len(rows) if table in ("blobs", "settings") else 2]:
        for _ in range(each):
            yield filled.after(update(table, f"rowid = {number}", **{column: flipped(value, random)}))


def check_damage(filled: Filled, table: str, column: str, *, each: int) -> None:
    """A damaged value is refused by whatever reads it, and changes nothing else."""
    for after in damages(filled, table, column, each=each):
        refused = [name for name, answer in after.items() if isinstance(answer, StorageError)]
        assert refused
        assert spelled({**after, **{name: filled.answers[name] for name in refused}}) == spelled(filled.answers)


def check_damaged_key(filled: Filled, table: str, column: str, *, each: int) -> None:
    """Of a row whose key is damaged nothing is read, or an error; nothing else changes."""
    before = parts(filled.answers)
    for after in damages(filled, table, column, each=each):
        assert spelled(after) != spelled(filled.answers) or table == "settings"
        assert parts(after) <= before


@pytest.mark.parametrize(("table", "column"), OTHER_COLUMNS)
def test_a_flipped_bit_is_refused(filled: Any, table: str, column: str) -> None:
    check_damage(filled("both"), table, column, each=1)


@pytest.mark.parametrize(("table", "column"), KEY_COLUMNS)
def test_a_flipped_bit_of_a_key_shows_no_other_state(filled: Any, table: str, column: str) -> None:
    check_damaged_key(filled("plain"), table, column, each=1)


@pytest.mark.slow
@pytest.mark.parametrize("protection", PROTECTION)
def test_more_flipped_bits_are_refused_however_the_database_is_protected(filled: Any, protection: str) -> None:
    for table, column in OTHER_COLUMNS:
        check_damage(filled(protection), table, column, each=4)
    for table, column in KEY_COLUMNS:
        check_damaged_key(filled(protection), table, column, each=4)


OF = "agentmem_checkpoints {} WHERE id = :id"
LOST: dict[str, tuple[str, dict[str, bytes]]] = {
    "another thread": (f"UPDATE {OF.format('SET thread = thread + 4096')}", {}),
    "another namespace": (f"UPDATE {OF.format('SET ns = :to')}", {"to": b"sub"}),
    "an older id": (f"UPDATE {OF.format('SET id = :to')}", {"to": b"0" * 36}),
    "no row": (f"DELETE FROM {OF.format('')}", {}),
}


@pytest.mark.parametrize("lost", LOST)
def test_a_checkpoint_that_is_not_found_under_its_keys_is_missed(
    any_saver: SQLAlchemySaver, ask: Sql, lost: str
) -> None:
    """Otherwise the thread would go on from an older state, or from none."""
    first, only = put(any_saver, config(), {"x": 1}), put(any_saver, config(ns="alone"), {"x": 3})
    newest = put(any_saver, first, {"x": 2})
    for at, found in ((newest, config()), (only, config(ns="alone"))):
        statement, parameters = LOST[lost]
        ask(statement, id=id_of(at).encode(), **parameters)
        for address in (at, found):
            for call in (
                lambda address: any_saver.get_tuple(address),
                lambda address: any_saver.get_delta_channel_history(config=address, channels=["x"]),
            ):
                with pytest.raises(StorageError, match=rf"the row of checkpoint '{id_of(at)[:24]}.* is missing"):
                    call(address)
    assert read(any_saver, first) == {"x": 1}
    assert any_saver.get_tuple(config(ns="none")) is None
    any_saver.delete_thread("t")
    assert any_saver.get_tuple(config()) is None
    assert any_saver.get_tuple(newest) is None


def test_ids_that_begin_alike_share_a_witness(any_saver: SQLAlchemySaver) -> None:
    """LangGraph's do not; of others none is taken for lost that was never there, or was pruned."""
    ids = [f"the customer's request no. {number:04}" for number in range(4)]
    at = config()
    for name in ids[:3]:
        stored = checkpoint({"x": name}) | {"id": name}
        at = any_saver.put(at, stored, {}, stored["channel_versions"])  # type: ignore[arg-type]
    assert any_saver.get_tuple(config(checkpoint_id=ids[3])) is None
    any_saver.prune(["t"])
    assert any_saver.get_tuple(config(checkpoint_id=ids[0])) is None
    assert read(any_saver, config()) == {"x": ids[2]}
    stored = checkpoint({"x": ids[3]}) | {"id": ids[3]}
    any_saver.put(config(checkpoint_id=ids[0]), stored, {}, stored["channel_versions"])  # type: ignore[arg-type]
    assert read(any_saver, config()) == {"x": ids[3]}


def test_checkpoints_of_versions_without_witnesses_are_read(any_saver: SQLAlchemySaver, ask: Sql) -> None:
    at = put(any_saver, put(any_saver, config(), {"x": 1}), {"x": 2})
    ask(f"DELETE FROM agentmem_blobs WHERE kind = {WITNESS}")
    assert [read(any_saver, each) for each in (config(), at)] == [{"x": 2}] * 2
    newest = put(any_saver, at, {"x": 3})
    any_saver.prune(["t"])
    assert read(any_saver, newest) == {"x": 3}
    assert any_saver.get_tuple(at) is None


SUB = f"{of('t')} AND ns = CAST('sub:1' AS BLOB)"
ALL_BUT_KEYS = "ns_name, parent, created, run, metadata, body, content, history, seal"
MOVES: dict[str, Change] = {
    "threads exchange names": exchange("threads", "name", "name = CAST('t' AS BLOB)", "name = CAST('other' AS BLOB)"),
    "threads exchange all": exchange(
        "threads", "key, name", "name = CAST('t' AS BLOB)", "name = CAST('other' AS BLOB)"
    ),
    "checkpoints exchange threads": exchange("checkpoints", "thread", NEWEST, of("other")),
    "checkpoints exchange namespaces": exchange("checkpoints", "ns", NEWEST, SUB),
    "checkpoints exchange ids": exchange("checkpoints", "id", NEWEST, OLDER),
    "checkpoints exchange content": exchange("checkpoints", "content", NEWEST, OLDER),
    "checkpoints exchange content and seals": exchange("checkpoints", "content, seal", NEWEST, OLDER),
    "checkpoints exchange all but their keys": exchange("checkpoints", ALL_BUT_KEYS, NEWEST, OLDER),
    "a checkpoint without its history": update("checkpoints", OLDER, history=None),
    "a checkpoint without a run": update("checkpoints", NEWEST, run=None),
    "a checkpoint without a parent": update("checkpoints", NEWEST, parent=None),
    "a checkpoint that is older": update("checkpoints", NEWEST, created=1),
    "a checkpoint of no content": update("checkpoints", NEWEST, content=b""),
    "writes exchange checkpoints": exchange("writes", "thread, checkpoint", WRITE + " AND idx = 0", of("other")),
    "writes exchange indices": exchange("writes", "idx", WRITE + " AND idx = 0", WRITE + " AND idx = 1"),
    "writes exchange values": exchange("writes", "digest", WRITE + " AND idx = 0", WRITE + " AND idx = 1"),
    "writes exchange values and seals": exchange(
        "writes", "digest, seal", WRITE + " AND idx = 0", WRITE + " AND idx = 1"
    ),
    "a write of another task": update("writes", WRITE, task=b"task x"),
    "a byte in the next column": update("writes", WRITE + " AND idx = 0", path=b"pathx", channel=b""),
    "content exchanges bodies": exchange("blobs", "body", f"{of('t')} AND kind = 0", f"{of('t')} AND kind = 2"),
    "content exchanges digests": exchange("blobs", "digest", f"{of('t')} AND kind = 1", f"{of('t')} AND kind = 5"),
    "content that is gone": lambda connection: connection.execute(f"DELETE FROM agentmem_blobs WHERE {of('t')}"),
    "content that is cut off": lambda connection: connection.execute(
        "UPDATE agentmem_blobs SET body = substr(body, 1, length(body) - 1)"
    ),
    "content of another kind": update("blobs", f"{of('t')} AND kind = 1", kind=2),
    "content of a kind that is none": update("blobs", f"{of('t')} AND kind = 1", kind=300),
}


@pytest.mark.parametrize("move", MOVES)
def test_rows_that_were_moved_or_exchanged_are_refused(filled: Any, move: str) -> None:
    before = filled("plain")
    after = before.after(MOVES[move])
    assert [name for name, answer in after.items() if isinstance(answer, StorageError)]
    assert parts(after) <= parts(before.answers)


# Somebody who can write to the database and knows how everything in it is made, but not the key.


def forge_write(connection: sqlite3.Connection, protection: Protection) -> None:
    """Make the pending writes of a task those of another."""
    connection.row_factory = sqlite3.Row
    row = dict(connection.execute(f"SELECT * FROM agentmem_writes WHERE {WRITE}").fetchone())
    connection.row_factory = None
    row["path"] = b"forged"
    where = f"{WRITE} AND idx = {row['idx']}"
    update("writes", where, path=b"forged", seal=seal_write(protection, "t", row))(connection)


def test_without_a_key_digests_find_damage_but_no_forger(filled: Any) -> None:
    """What `hmac_key` is for; and that the forger of the next test knows the trade."""
    found = filled("plain")
    after = found.after(lambda connection: forge(connection, Protection(JsonPlusSerializer(), None)))
    assert after["newest"].checkpoint["channel_values"]["x"] == b"forged"
    after = found.after(lambda connection: forge_write(connection, Protection(JsonPlusSerializer(), None)))
    assert not isinstance(after["get 0"], StorageError)


@pytest.mark.parametrize("key", [None, b"another key of length 32 or so..."])
@pytest.mark.parametrize("forgery", [forge, forge_write])
def test_with_a_key_nobody_without_it_can_change_anything(filled: Any, forgery: Any, key: bytes | None) -> None:
    found = filled("hmac")
    after = found.after(lambda connection: forgery(connection, Protection(JsonPlusSerializer(), key)))
    name = "newest" if forgery is forge else "get 0"
    assert isinstance(after[name], StorageError)
    assert isinstance(after["list"], StorageError)


def test_a_body_and_its_digest_made_anew_are_refused_with_a_key(filled: Any) -> None:
    """The digest is what content refers to content by, so both are changed everywhere."""

    def rewrite(connection: sqlite3.Connection) -> None:
        protection = Protection(JsonPlusSerializer(), None)
        rows = connection.execute(f"SELECT rowid, kind, body FROM agentmem_blobs WHERE kind <> {WITNESS}").fetchall()
        for number, kind, body in rows:
            update("blobs", f"rowid = {number}", digest=protection.digest(kind, protection.decrypt(body)))(connection)

    after = filled("hmac").after(rewrite)
    assert all(isinstance(answer, StorageError) for name, answer in after.items() if name != "history 0")


PLANTED: dict[str, Change] = {
    "content": update("blobs", of("t"), body=b"\0msgpack\0\x01"),
    "metadata": update("checkpoints", NEWEST, metadata=b"\0msgpack\0\x80"),
    "a checkpoint": update("checkpoints", NEWEST, body=b"\0msgpack\0\x80"),
    "an empty body": update("blobs", of("t"), body=b""),
    "a body with a made-up mark": update("blobs", of("t"), body=b"\7msgpack"),
    "a body of another cipher": update("blobs", of("t"), body=b"\1rot13\0msgpack"),
    "a forged checkpoint": lambda connection: forge(connection, Protection(JsonPlusSerializer(), None)),
}


@pytest.mark.parametrize("what", PLANTED)
def test_unencrypted_rows_in_an_encrypted_database_are_refused(filled: Any, what: str) -> None:
    """LangGraph's own serializer takes them."""
    after = filled("encrypted").after(PLANTED[what])
    assert isinstance(after["newest"], StorageError)
    assert isinstance(after["list"], StorageError)
    assert spelled(after["newest of other"]) == spelled(filled("encrypted").answers["newest of other"])


def test_a_secret_that_someone_planted_is_refused(filled: Any) -> None:
    """Who knows the key of the digests could make everything else to fit it, unencrypted."""
    known = Protection(JsonPlusSerializer(), b"the attacker knows this secret..")

    def plant(connection: sqlite3.Connection) -> None:
        update("settings", "name = CAST('secret' AS BLOB)", value=b"\0the attacker knows this secret..")(connection)
        update("settings", "name = CAST('check' AS BLOB)", value=known.row_mac([b"agentmem"]))(connection)
        forge(connection, known, alone=True)

    after = filled("encrypted").after(plant)
    assert all(isinstance(answer, StorageError) for answer in after.values())


@pytest.mark.parametrize("name", [b"protection", b"check", None])
def test_settings_that_were_taken_out_open_nothing(filled: Any, name: bytes | None) -> None:
    def take_out(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM agentmem_settings WHERE name = ? OR ? IS NULL", (name, name))

    def forged(connection: sqlite3.Connection) -> None:
        take_out(connection)
        forge(connection, Protection(JsonPlusSerializer(), None))

    for protection in ("hmac", "both"):
        after = filled(protection).after(take_out if protection == "both" else forged)
        assert parts(after) <= parts(filled(protection).answers)
        if protection == "hmac":
            assert isinstance(after["newest"], StorageError)
    wrong = filled("hmac").after(take_out, hmac_key=b"another key of length 32 or so...")
    assert all(isinstance(answer, StorageError) for answer in wrong.values())


@pytest.mark.parametrize("made", PROTECTION)
@pytest.mark.parametrize("opened", [*PROTECTION, "other hmac_key", "other cipher key"])
def test_a_database_opens_only_with_what_it_was_made_with(filled: Any, made: str, opened: str) -> None:
    other = {
        "other hmac_key": {**PROTECTION[made], "hmac_key": bytes(32)},
        "other cipher key": {**PROTECTION[made], "serde": aes(b"another aes key.")},
    }
    after = filled(made).after(lambda connection: None, **({"cache_bytes": 0} | (PROTECTION | other)[opened]))
    if made == opened:
        assert spelled(after) == spelled(filled(made).answers)
        return
    for answer in after.values():
        assert isinstance(answer, StorageError)
        assert "pass" in str(answer)
        assert str(HMAC_KEY) not in str(answer)


@pytest.mark.parametrize("key", [b"", b"x" * 15, "x" * 32, bytearray(32), 7])
def test_a_bad_key_is_refused_at_once(url: str, key: Any) -> None:
    with pytest.raises(ConfigError, match="hmac_key of at least 16 random bytes"):
        SQLAlchemySaver.from_url(url, hmac_key=key)


# What would run code.


@dataclass
class Part:
    name: str


class Pair(NamedTuple):
    left: int


class Shade(Enum):
    DARK = "dark"


class Model(BaseModel):
    secret: SecretStr


def test_types_that_langgraph_stores_come_back(url: str) -> None:
    values = [Part("x"), Pair(1), Shade.DARK, Model(secret=SecretStr("s")), SecretStr("t"), Path("/a"), {1}]
    with SQLAlchemySaver.from_url(url, cache_bytes=0) as saver:
        at = put(saver, config(), {"one": Part("y"), "many": values})
        assert read(saver, at) == {"one": Part("y"), "many": values}


@pytest.mark.parametrize(
    ("what", "nested"),
    [(("builtins", "eval", "1"), False), (("subprocess", "Popen", ["true"]), True), (("this", "s", 1), False)],
)
def test_a_call_that_someone_stored_is_refused_by_name(url: str, path: Path, what: Any, nested: bool) -> None:
    call: Any = ormsgpack.Ext(0, ormsgpack.packb(what))
    if nested:
        call = ormsgpack.Ext(1, ormsgpack.packb(("langgraph.types", "Send", ["n", call])))
    with SQLAlchemySaver.from_url(url, cache_bytes=0) as saver:
        at = put(saver, config(), {"x": ["item", "y" * 100]})
        with closing(sqlite3.connect(path)) as connection:
            forge(connection, saver._protection, body=b"msgpack\0" + ormsgpack.packb(call))
            connection.commit()
        for ask in (lambda: saver.get_tuple(at), lambda: list(saver.list(None))):
            with pytest.raises(StorageError, match=rf"names {what[0]}\.{what[1]}, .*allowed_msgpack_modules=\["):
                ask()
    assert "this" not in sys.modules


def test_a_name_that_would_be_imported_when_it_is_got_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of modules whose names load on first use (`agentmem` is one) only what is loaded counts."""

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            pytest.fail(f"{name} was loaded")

    plain: Any = ModuleType("lazy_names")
    plain.__getattr__ = lambda name: pytest.fail(f"{name} was loaded")
    # What a module has by its class, it has not of its own: `__setattr__` would change any module.
    for module, name in (
        (plain, "load"),
        (Lazy("lazy_class"), "load"),
        (json, "__getattribute__"),
        (json, "__setattr__"),
    ):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        call = ormsgpack.Ext(0, ormsgpack.packb((module.__name__, name, "loads")))
        with pytest.raises(StorageError, match=rf"names {module.__name__}\.{name}"):
            load(CheckedSerializer(), b"msgpack\0" + ormsgpack.packb(call))


@pytest.mark.parametrize(
    "body", [b"msgpack\0\xc1", b"msgpack\0" + b"\x91" * 2000, b"json\0{", b"soup\0x", b"", b"\xff\0"]
)
def test_bytes_that_no_serializer_made_are_an_error(body: bytes) -> None:
    with pytest.raises(StorageError, match="cannot be read by CheckedSerializer"):
        load(CheckedSerializer(), body)


# Pickles.


class Opaque:
    """Msgpack cannot hold it."""


class Loud:
    """Says so when something unpickles it."""

    def __reduce__(self) -> Any:
        return logging.getLogger("unpickled").error, ("unpickled",)


def test_nothing_is_pickled_even_where_the_serializer_would(url: str, sql: Sql) -> None:
    with SQLAlchemySaver.from_url(url, serde=JsonPlusSerializer(pickle_fallback=True)) as saver:
        at = put(saver, config(), {"x": 1})
        before = all_rows(sql)
        for value in (Opaque(), ["x", Opaque()], {"a": Opaque()}, HumanMessage("x", id="1", note=Opaque())):
            with pytest.raises(StorageError, match="pickle"):
                put(saver, at, {"y": "good", "x": value})
            with pytest.raises(StorageError, match="pickle"):
                saver.put_writes(at, [("y", "good"), ("x", value)], "task")
        with pytest.raises(StorageError, match="pickle"):
            put(saver, at, {"x": 1}, note=Opaque())
    assert all_rows(sql) == before


@pytest.mark.parametrize("protection", PROTECTION)
def test_a_pickle_that_someone_stored_is_not_read(
    url: str, path: Path, protection: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By someone with all the keys, or before there was a rule against it."""
    trusting = JsonPlusSerializer(pickle_fallback=True)
    tag, pickled = trusting.dumps_typed(Loud())
    assert tag == "pickle"
    trusting.loads_typed((tag, pickled))
    assert "unpickled" in caplog.text
    caplog.clear()
    serde = aes(serde=trusting) if "serde" in PROTECTION[protection] else trusting
    with SQLAlchemySaver.from_url(url, **{**PROTECTION[protection], "serde": serde}) as saver:
        at = put(saver, config(), {"x": ["item", "y" * 100]})
        with closing(sqlite3.connect(path)) as connection:
            forge(connection, saver._protection, body=b"pickle\0" + pickled)
            connection.commit()
        with pytest.raises(StorageError, match="pickle"):
            saver.get_tuple(at)
        with pytest.raises(StorageError, match="pickle"):
            list(saver.list(None))
    assert "unpickled" not in caplog.text
