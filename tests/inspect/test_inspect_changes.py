"""Facts, the audit trail, and what can be forgotten and exported on the page of `agentmem inspect`."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage, HumanMessage

from agentmem_chroma import Fact, FactStore
from agentmem_governance import Governor, Receipt
from agentmem_inspect import make_app
from agentmem_inspect.catalog import PAGE
from agentmem_inspect.changes import Changes
from agentmem_inspect.contents import find
from agentmem_sql import SQLAlchemySaver
from tests.helpers.inspected import HOST, TOKEN, Browser, turns
from tests.helpers.sql_cases import config, put

KEY = b"k" * 32


@pytest.fixture
def owner(saver: SQLAlchemySaver, tmp_path: Path) -> Iterator[Browser]:
    """Two subjects' threads; a fact that a reply of the first one cites, and one that it does not."""
    turns(saver, "ada/1", "one", "two")
    (at,) = turns(saver, "ben/1", "secret")
    with FactStore(tmp_path / "facts", embeddings=DeterministicFakeEmbedding(size=8)) as facts:
        facts.add([Fact("Ports are in ports.md.", source="wiki", thread="ben/1"), Fact("Nobody asked.", source="mail")])
        notes = [
            {"number": number, "id": fact.id, "source": fact.source, "score": 0.9}
            for number, fact in enumerate(sorted(facts.facts(), key=lambda fact: fact.text, reverse=True), start=1)
        ]
        reply = AIMessage("See ports.md [1].", id="cites", response_metadata={"facts": notes})
        put(saver, at, {"messages": [HumanMessage("Where?", id="asks"), reply]})
        governor = Governor(saver, facts=facts, actor="inspector", key=KEY)
        with Browser(make_app(governor, token=TOKEN, hosts=[HOST])) as opened:
            yield opened


def test_facts_are_shown_with_sources_and_the_replies_that_cited_them(owner: Browser, governor: Governor) -> None:
    page = owner.read("/facts")
    assert "2 facts" in page
    assert "wiki" in page
    links = dict(re.findall(r'href="(/facts/\w+)">([^<]+)', page))
    cited, shown = (next(link for link, text in links.items() if text.startswith(word)) for word in ("Ports", "Nobody"))
    assert "<td>yes</td>" in owner.read(cited)
    assert "<td>no</td>" in owner.read(shown)
    assert "ben/1" in owner.read(cited)
    assert [entry.event for entry in governor.audit("ben/1").entries].count("inspected") == 1, "a reply was shown"
    assert "Ports are in" in owner.read("/facts?q=Ports are in ports.md.").partition("Nobody")[0]
    owner.read("/facts/none", 404)
    checkpoint = owner.read("/threads/2/checkpoint")
    assert re.search(r'class="cited">\[1\] <a [^>]+>Ports are in ports.md.</a> <span class="source">wiki', checkpoint)


def test_facts_come_page_by_page(saver: SQLAlchemySaver, tmp_path: Path) -> None:
    with FactStore(tmp_path / "facts", embeddings=DeterministicFakeEmbedding(size=8)) as facts:
        facts.add("the first")
        facts.add([Fact(f"Fact {number}.") for number in range(PAGE)])
        with Browser(make_app(Governor(saver, facts=facts), token=TOKEN, hosts=[HOST])) as opened:
            assert f"{PAGE + 1} facts" in opened.read("/facts")
            assert "the first" not in opened.read("/facts")
            assert "the first" in opened.read("/facts?page=1")


def test_the_audit_trail_is_shown_and_a_broken_chain_stands_out(owner: Browser, tmp_path: Path) -> None:
    page = owner.read("/threads/1/audit")
    assert "The chain holds: 5 rows" in page
    assert page.index("inspected") < page.index("written"), "newest first"
    assert "inspected" in owner.read("/audit")
    connection = sqlite3.connect(tmp_path / "threads.db")
    with connection:
        connection.execute("DELETE FROM agentmem_audit WHERE seq = 2")
    connection.close()
    assert "does not hold" in owner.read("/threads/1/audit")


def test_a_subject_is_forgotten_when_its_name_is_written_and_the_receipt_is_shown(
    owner: Browser, saver: SQLAlchemySaver
) -> None:
    assert re.findall(r'name=(\w+)">', owner.read("/subjects")) == ["ada", "ben"]
    assert "ben/1" in owner.read("/subject?name=ben")
    assert "nothing was forgotten" in owner.submit("/subject/forget", 400, subject="ben", confirm="Ben")
    page = owner.submit("/subject/forget", subject="ben", confirm="ben")
    assert "3 checkpoints, 0 messages and 1 fact are gone" in page
    assert "backups" in page
    file = re.search(r'href="(/receipts/\w+/file)"', page)
    assert file is not None
    receipt = Receipt.from_json(owner.get(file[1]).text)
    assert receipt.is_signed_by(KEY)
    assert (receipt.subject, receipt.actor) == ("ben", "inspector")
    assert saver.get_tuple(config("ben/1")) is None
    assert saver.get_tuple(config("ada/1")) is not None
    assert "ben" not in re.findall(r'name=(\w+)">', owner.read("/subjects"))
    owner.read("/subject?name=ben", 404)
    owner.read("/receipts/none", 404)


def test_a_message_needs_the_model_of_its_memory_to_be_forgotten(owner: Browser, saver: SQLAlchemySaver) -> None:
    assert "ok two" in owner.read("/threads/1/forget?message=two-reply")
    assert "has to be written anew" in owner.submit("/threads/1/forget", 400, message="two-asked", with_reply="1")
    put(saver, config("plain"), {"messages": [HumanMessage("keep", id="1"), HumanMessage("drop", id="2")]})
    page = owner.submit("/threads/3/forget", message="2")
    assert "1 message and" in page
    newest = saver.get_tuple(config("plain"))
    assert newest is not None
    assert [message.text for message in newest.checkpoint["channel_values"]["messages"]] == ["keep"]
    at = put(saver, config("kept"), {"messages": [HumanMessage("keep", id="3"), HumanMessage("drop", id="4")]})
    assert "1 checkpoint was rewritten" in owner.submit("/threads/4/forget", message="4", keep_checkpoints="1")
    rewritten = saver.get_tuple(at)
    assert rewritten is not None
    assert [message.text for message in rewritten.checkpoint["channel_values"]["messages"]] == ["keep"]


def test_an_export_is_kept_as_a_file_until_the_page_ends(
    owner: Browser, saver: SQLAlchemySaver, tmp_path: Path
) -> None:
    page = owner.submit("/subject/export", subject="ada")
    assert "1 thread with 4 checkpoints and 0 facts" in page
    link = re.search(r'href="(/exports/\w+/file)"', page)
    assert link is not None
    file = tmp_path / "ada.zip"
    file.write_bytes(owner.get(link[1]).content)
    with SQLAlchemySaver.from_url(f"sqlite:///{tmp_path / 'elsewhere.db'}") as other:
        assert Governor(other).restore(file).checkpoints == 4
    owner.read("/exports/none", 404)


def test_files_of_exports_go_when_the_page_ends(governor: Governor, saver: SQLAlchemySaver) -> None:
    turns(saver, "ada/1", "one")
    changes = Changes(governor)
    _, path = changes.exports[changes.export("ada")]
    assert path.exists()
    assert path.parent.stat().st_mode & 0o077 == 0
    changes.close()
    assert not path.exists()


def test_files_of_exports_go_when_something_is_forgotten(governor: Governor, saver: SQLAlchemySaver) -> None:
    turns(saver, "ada/1", "one")
    changes = Changes(governor)
    _, path = changes.exports[changes.export("ada")]
    changes.forget_subject("ada")
    assert not path.exists()
    assert changes.exports == {}
    changes.close()


def test_who_looks_again_later_is_noted_again(governor: Governor, saver: SQLAlchemySaver) -> None:
    turns(saver, "ada/1", "one")
    times = iter([0.0, 599.0, 601.0])
    changes = Changes(governor, clock=lambda: next(times))
    for _ in range(3):
        changes.note_inspection("ada/1")
    assert [entry.event for entry in governor.audit("ada/1").entries].count("inspected") == 2


def test_an_interrupted_deletion_is_completed_on_request(
    owner: Browser, saver: SQLAlchemySaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Governor, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Governor(saver).forget("ada")
    assert "1 deletion began and is not complete" in owner.read("/subjects")
    assert "not complete" not in owner.submit("/resume")
    assert "forget subject" in owner.read("/subjects")


def test_a_checkpoint_of_a_subgraph_is_not_gone_back_to(owner: Browser, saver: SQLAlchemySaver) -> None:
    at = put(saver, config("ada/1", "child"), {"n": 1})
    checkpoint = at["configurable"]["checkpoint_id"]
    assert find(saver, 1, "ada/1", "child", checkpoint).id == checkpoint
    assert "child (1)" in owner.read("/threads/1")
    assert "go on from here" not in owner.read(f"/threads/1/checkpoint?ns=child&at={checkpoint}")
    assert "subgraph" in owner.submit("/threads/1/rewind", 400, at=checkpoint, ns="child")
