"""Exact facts: who is shown which, and `/v1/facts`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from langchain_core.embeddings import Embeddings
from openai import OpenAI

from agentmem_chroma import FactStore
from agentmem_governance import Governor, Receipt
from agentmem_serve import KeyFile
from agentmem_sql import SQLAlchemySaver
from tests.serve.conftest import Serve, plain, say, text_of

LIMIT = "The retry limit is 300."
ASKED = "What is the retry limit?"


class Words(Embeddings):
    """Texts are close to each other by the words that they share."""

    def embed_query(self, text: str) -> list[float]:
        vector = [0.01] * 64
        for word in re.findall(r"\w+", text.lower()):
            vector[crc32(word.encode()) % 64] += 1
        return vector

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FactStore]:
    with FactStore(tmp_path / "facts", embeddings=Words()) as opened:
        yield opened


@pytest.fixture
def users(serve: Serve, store: FactStore, tmp_path: Path) -> dict[str, OpenAI]:
    """Clients of two subjects of one server with facts."""
    keys = KeyFile(tmp_path / "keys.jsonl")
    ada = serve(key=keys.add("ada"), keys=keys, facts=store, min_score=0.5)
    return {"ada": ada, "ben": ada.copy(api_key=keys.add("ben"))}


def add(client: OpenAI, *texts: str, **more: Any) -> list[dict[str, Any]]:
    answer = plain(client, "/v1/facts", "POST", json={"texts": texts, **more})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


def shown(completion: Any) -> list[str]:
    """The ids of the facts that a turn showed."""
    return [fact["id"] for fact in completion.agentmem.get("facts", [])]


def test_facts_are_shown_and_cited_and_not_written(users: dict[str, OpenAI]) -> None:
    ada = users["ada"]
    (fact,) = add(ada, LIMIT, source="runbook.md")
    reply = say(ada, ASKED, "1")
    assert "300" in text_of(reply)
    (cited,) = reply.agentmem["facts"]
    assert (cited["number"], cited["id"], cited["source"]) == (1, fact["id"], "runbook.md")
    stream = list(say(ada, ASKED, stream=True))
    assert shown(next(chunk for chunk in stream if hasattr(chunk, "agentmem"))) == [fact["id"]]
    response = ada.responses.create(model="nano", input=ASKED)
    assert "300" in response.output_text
    assert ada.responses.retrieve(response.id).agentmem["facts"][0]["id"] == fact["id"]  # type: ignore[attr-defined]
    assert shown(say(ada, "Hello!", "1")) == []
    session = plain(ada, "/v1/sessions/1").json()
    assert LIMIT not in [message["content"] for message in session["messages"]]


def test_a_subject_is_shown_its_own_facts_those_of_the_session_and_those_of_nobody(
    users: dict[str, OpenAI], store: FactStore
) -> None:
    ada, ben = users["ada"], users["ben"]
    (everywhere,) = add(ada, LIMIT)
    (of_session,) = add(ada, "The retry limit is 4.", session="1")
    common = store.add("The retry limit is 5.")
    assert set(shown(say(ada, ASKED, "1"))) == {everywhere["id"], of_session["id"], *common}
    assert set(shown(say(ada, ASKED, "2"))) == set(shown(say(ada, ASKED))) == {everywhere["id"], *common}
    for thread in (None, "1", "ada/1"):
        assert shown(say(ben, ASKED, thread)) == common
    assert [fact["text"] for fact in plain(ada, "/v1/facts").json()["data"]] == [LIMIT]
    assert plain(ada, "/v1/facts?session=1").json()["data"][0]["session"] == "1"
    for path in ("/v1/facts", "/v1/facts?session=1", "/v1/facts?session=ada/1"):
        assert plain(ben, path).json()["data"] == []
    for id in (everywhere["id"], of_session["id"], *common):
        assert plain(ben, f"/v1/facts/{id}", "DELETE").status_code == 404


def test_facts_are_listed_added_and_deleted(users: dict[str, OpenAI], store: FactStore, serve: Serve) -> None:
    ada = users["ada"]
    first, second = add(ada, LIMIT, "The database is postgres.", source="a.md", metadata={"page": 3})
    assert add(ada, LIMIT, source="a.md")[0]["id"] == first["id"]
    assert store.count() == 2
    assert (first["source"], first["session"], first["metadata"]) == ("a.md", None, {"page": 3})
    page = plain(ada, "/v1/facts?limit=1").json()
    assert page["has_more"] is True
    rest = plain(ada, f"/v1/facts?after={page['data'][0]['id']}").json()
    assert [fact["id"] for fact in page["data"] + rest["data"]] == [fact.id for fact in store.facts()]
    assert plain(ada, f"/v1/facts/{second['id']}", "DELETE").json()["deleted"] is True
    assert plain(ada, f"/v1/facts/{second['id']}", "DELETE").status_code == 404
    assert [fact.text for fact in store.facts()] == [LIMIT]
    for wrong in ({"texts": []}, {"texts": [" "]}, {"texts": ["x"], "session": ""}, {"texts": ["x"], "thread": "1"}):
        assert plain(ada, "/v1/facts", "POST", json=wrong).status_code == 400
    assert plain(ada, "/v1/facts?after=none").status_code == 404
    assert plain(serve(), "/v1/facts").status_code == 404


def test_facts_are_forgotten_with_their_session_and_their_subject(
    users: dict[str, OpenAI], store: FactStore, url: str
) -> None:
    ada, ben = users["ada"], users["ben"]
    kept = [fact["id"] for fact in add(ben, LIMIT)]
    (everywhere,) = add(ada, LIMIT)
    (of_session,) = add(ada, LIMIT, session="1")
    (of_no_turn,) = add(ada, LIMIT, session="2")
    say(ada, "Hello!", "1")
    for session, fact in (("1", of_session), ("2", of_no_turn)):
        receipt = plain(ada, f"/v1/sessions/{session}", "DELETE").json()
        assert receipt["facts"] == [fact["id"]]
        assert store.get(fact["id"]) == []
        with SQLAlchemySaver.from_url(url) as saver:
            assert Governor(saver, facts=store).verify(Receipt.from_json(json.dumps(receipt))).holds
    assert plain(ada, "/v1/sessions", "DELETE").json()["facts"] == [everywhere["id"]]
    assert [fact.id for fact in store.facts()] == kept
