"""Forgetting a subject: nothing of it is left in the files, others keep theirs, and the receipt says what went."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage

from agentmem.errors import ConfigError
from agentmem_chroma import Fact, FactStore
from agentmem_governance import Governor, Receipt
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import Sql, config, put

WORDS = ("Zephyrine", "Kestrel-81")  # planted in everything that a subject has: ids, messages, facts, sources
KEY = b"k" * 32
MEMORY = {"shape": [1, 1, 2, 2], "data": b"", "model_fingerprint": "m", "adapter_fingerprint": "a"}


def talk(saver: SQLAlchemySaver, thread: str, word: str, turns: int = 2) -> None:
    """A thread whose every checkpoint, pending write and metadata holds a word."""
    at, said = config(thread), list[Any]()
    for number in range(turns):
        note = {"memory": {"digest": f"{number}", "written": 1, "read": 1}, "facts": [{"id": "f", "source": word}]}
        said += [HumanMessage(f"It is {word}, {number}.", id=f"{thread}-q{number}")]
        said += [AIMessage(f"{word}, yes.", id=f"{thread}-a{number}", response_metadata=note)]
        values = {
            "messages": list(said),
            "memory": {**MEMORY, "digest": f"{abs(hash(thread))}{number}"},
            "note": word * 3,
        }
        at = put(saver, at, values, note=word, user_id=word)
        saver.put_writes(at, [("note", f"pending {word}")], f"task-{number}")


def left(folder: Path) -> list[str]:
    """The files that hold a planted word, in UTF-8 or UTF-16."""
    pieces = [word.encode(name) for word in WORDS for name in ("utf-8", "utf-16-le", "utf-16-be")]
    pieces += [piece.lower() for piece in pieces]
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file.name for file in files if any(piece in file.read_bytes() for piece in pieces)]


def fill(saver: SQLAlchemySaver, facts: FactStore | None) -> None:
    for thread in ("Zephyrine/1", "Zephyrine/2"):
        talk(saver, thread, "Kestrel-81")
    talk(saver, "ben/1", "Wren-7")
    if facts is not None:
        facts.add(Fact("The word is Kestrel-81.", source="from-Zephyrine", thread="Zephyrine/1"))
        facts.add(Fact("Zephyrine likes tea.", thread="Zephyrine", metadata={"note": "Kestrel-81"}))
        facts.add(Fact("The word is Wren-7.", source="ben", thread="ben/1"))


@pytest.mark.parametrize("audit", [False, True])
def test_no_byte_is_left_on_disk(folder: Path, url: str, facts: FactStore, audit: bool) -> None:
    with SQLAlchemySaver.from_url(url, audit=audit) as saver:
        governor = Governor(saver, facts=facts, actor="support", key=KEY)
        fill(saver, facts)
        assert left(folder)
        assert [(each.name, len(each.threads), each.facts) for each in governor.subjects()] == [
            ("Zephyrine", 2, 2),
            ("ben", 1, 1),
        ]
        receipt = governor.forget("Zephyrine")
        assert left(folder) == []
        assert (receipt.checkpoints, len(receipt.facts), receipt.actor) == (4, 2, "support")
        assert [each.name for each in governor.subjects()] == ["ben"]
        assert len(list(saver.list(config("ben/1")))) == 2
        assert facts.search("The word is Wren-7.", 1)[0].score == 1.0
        checked = Governor(saver).verify(receipt)
        assert (checked.noted, checked.holds) == ("same" if audit else "absent", True)
        changed = Governor(saver).verify(replace(receipt, not_reached=(), signature=None))
        assert (changed.noted, changed.holds) == (("another", False) if audit else ("absent", True))
        assert governor.audit("Zephyrine/1").holds
        assert [entry.event for entry in governor.audit("Zephyrine/1").entries] == (
            ["written", "written", "forgotten"] if audit else []
        )
        assert governor.audit("ben/1").holds
        assert governor.audit().holds
    facts.close()
    assert left(folder) == []


def test_the_receipt_is_checked_against_what_is_there(tmp_path: Path, url: str, facts: FactStore) -> None:
    with SQLAlchemySaver.from_url(url) as saver:
        governor = Governor(saver, facts=facts, key=KEY)
        fill(saver, facts)
        kept = saver.get_tuple(config("Zephyrine/1"))
        assert kept is not None
        receipt = Receipt.load(governor.forget("Zephyrine").save(tmp_path / "receipt.json"))
        assert governor.verify(receipt).holds
        assert governor.verify(receipt).signature == "valid"
        assert Governor(saver, key=b"another key, long enough").verify(receipt).signature == "invalid"
        assert not any(word in receipt.to_json() for word in ("Kestrel-81", "Zephyrine/1"))
        assert "backups" in " ".join(receipt.not_reached)

        assert "stale KV" in receipt.not_reached[0]

        put(saver, config("Zephyrine/1"), {"x": 1})  # she is a user again: nothing of what went is back
        assert governor.verify(receipt).holds
        saver.put(config("copy"), kept.checkpoint, kept.metadata, dict(kept.checkpoint["channel_versions"]))
        facts.add(Fact("The word is Kestrel-81.", source="from-Zephyrine", thread="Zephyrine/1"))
        back = governor.verify(receipt).back
        assert len(back) == 2
        assert "1 checkpoints that went" in back[0]
        assert "1 facts that went" in back[1]


def test_rows_go_and_tables_are_written_anew_on_every_database(database_url: str, ask: Sql) -> None:
    with SQLAlchemySaver.from_url(database_url, audit=True) as saver:
        governor = Governor(saver, actor="support")
        fill(saver, None)
        receipt = governor.forget("Zephyrine")
        assert any("anew" in done or "VACUUM" in done for done in receipt.purged), receipt
        assert governor.verify(receipt).holds
    names = ("threads", "blobs", "checkpoints", "writes", "audit", "subjects", "journal")
    rows = [row for name in names for row in ask(f"SELECT * FROM agentmem_{name}")]
    stored = b"".join(bytes(part) for row in rows for part in row if isinstance(part, bytes | memoryview))
    assert not any(word.encode() in stored for word in WORDS)
    assert b"Wren-7" in stored
    assert receipt.to_json().count("until") >= (0 if database_url.startswith("sqlite") else 1)


@pytest.mark.parametrize("audit", [False, True])
def test_a_thread_alone_is_forgotten_with_its_facts(url: str, facts: FactStore, audit: bool) -> None:
    with SQLAlchemySaver.from_url(url, audit=audit) as saver:
        governor = Governor(saver, facts=facts, key=KEY)
        fill(saver, facts)
        receipt = governor.forget(thread="Zephyrine/1")
        assert (receipt.operation, receipt.subject, receipt.checkpoints) == ("forget thread", "Zephyrine", 2)
        assert [fact.thread for fact in facts.facts()] == ["Zephyrine", "ben/1"]
        assert governor.subjects()[0].threads == ("Zephyrine/2",)
        assert governor.verify(receipt).holds
        assert governor.audit("Zephyrine/1").holds
        talk(saver, "Zephyrine/1", "Kestrel-81")
        assert governor.verify(receipt).holds, "a thread may begin anew"


def test_rules_say_whose_threads_and_facts_are_whose(url: str, facts: FactStore) -> None:
    with SQLAlchemySaver.from_url(url) as saver:
        governor = Governor(saver, facts=facts)
        for thread, user in (("1f", "u1"), ("2f", "u2"), ("eve/3", None), ("4f", None)):
            put(saver, config(thread), {"x": 1}, **({} if user is None else {"user_id": user}))
        facts.add(
            [Fact("a", source="handbook"), Fact("b", metadata={"user_id": "u1"}), Fact("c", thread="4f"), Fact("d")]
        )
        governor.assign("ada", threads=["4f"], user_ids=["u1"], sources=["handbook"])
        assert {each.name: (each.threads, each.facts) for each in governor.subjects()} == {
            "ada": (("1f", "4f"), 3),
            "2f": (("2f",), 0),
            "eve": (("eve/3",), 0),
        }
        governor.assign_by_user_id()
        assert "u2" in [each.name for each in governor.subjects()]
        governor.forget("ada")
        assert [fact.text for fact in facts.facts()] == ["d"]
        assert {each.name for each in governor.subjects()} == {"u2", "eve"}
        put(saver, config("4f"), {"x": 1})
        assert "4f" in {each.name for each in governor.subjects()}, "the rule has gone with the subject"


def test_what_cannot_be_meant_is_refused(url: str) -> None:
    with SQLAlchemySaver.from_url(url) as saver:
        with pytest.raises(ConfigError, match="16 random bytes"):
            Governor(saver, key=b"short")
        governor = Governor(saver)
        for wrong in ({}, {"subject": "a", "message": "m"}, {"subject": "a", "thread": "t"}, {"message": "m"}):
            with pytest.raises(ConfigError):
                governor.forget(**wrong)
        put(saver, config("1"), {"x": 1})
        made = json.loads(governor.forget(thread="1").to_json())
        (thread,) = made["threads"]
        others = [thread | {name: value} for name in ("thread", "ids", "checkpoints") for value in (None, "x", [5])]
        for change in (
            *({name: value} for name in made for value in (5.5, [5], {"a": 1})),
            *({"threads": [other]} for other in (*others, {}, 5)),
            {"time": "noon"},
            {"more": 1},
        ):
            with pytest.raises(ConfigError, match="expected a receipt"):
                Receipt.from_json(json.dumps(made | change))
        for text in ("[]", "{", "[" * 100_000):
            with pytest.raises(ConfigError, match="receipt"):
                Receipt.from_json(text)
        assert governor.verify(Receipt.from_json(json.dumps(made))).holds


def test_names_that_are_no_names_are_refused_before_anything_is_done(url: str) -> None:
    with SQLAlchemySaver.from_url(url, audit=True) as saver:
        governor = Governor(saver)
        for thread in ("4", "2", "42"):
            put(saver, config(thread), {"x": 1})
        for kind in ("threads", "user_ids", "sources"):
            for wrong in ("42", b"42", None, {"42": 1}, [None], [""]):
                with pytest.raises(ConfigError):
                    governor.assign("ada", **{kind: wrong})
        for wrong in ({"subject": ["ada"]}, {"thread": None}, {"thread": ["4"]}, {"thread": "4", "message": ["m"]}):
            with pytest.raises(ConfigError):
                governor.forget(**wrong)
        for method in (governor.audit, governor.note_inspection):
            with pytest.raises(ConfigError):
                method(["4"])
        assert governor.pending() == []
        assert governor.forget("ada").checkpoints == 0
        governor.assign("ada", threads=[42])
        assert governor.forget("ada").checkpoints == 1, "42 and no other"
        assert governor.forget(thread=4).checkpoints == 1
        assert governor.audit(2).holds


def test_forgetting_nothing_gives_an_empty_receipt(url: str) -> None:
    with SQLAlchemySaver.from_url(url) as saver:
        receipt = Governor(saver).forget("nobody")
        assert (receipt.checkpoints, receipt.facts, receipt.signature) == (0, (), None)
