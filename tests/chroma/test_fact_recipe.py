"""The prompt recipe: numbered facts in, citations out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage, HumanMessage

from agentmem.errors import FactStoreError
from agentmem_chroma import FactRetriever, FactStore, cited, facts_block
from agentmem_langgraph import ChatDeltaMem, MemoryNode
from tests.helpers.fake_engine import FakeEngine

DOCUMENTS = [Document(page_content=text) for text in ("first text", "second text", "third text")]


def test_the_block_numbers_its_facts() -> None:
    assert facts_block(DOCUMENTS[:2]) == "Facts:\nfirst text [1]\nsecond text [2]"
    assert facts_block([]) == ""


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "  a\n\n  b\n", "a\u2028b", "a\x0bb"])
def test_a_fact_takes_one_line(text: str) -> None:
    assert facts_block([Document(page_content=text)]) == "Facts:\na b [1]"


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ("The port is 8080 [2].", [2]),
        ("So [3][1], and again [3].", [3, 1]),
        ("Both [1, 3] say so; [2,1] too.", [1, 3, 2]),
        ("Nothing is known.", []),
        ("[0] [4] [-1] [1a] [] [99999999999999999999]", []),
        ("Call `argv[1]` first [2].", [2]),
        ("```python\nx = rows[1]\n```\nas said [3]", [3]),
        ("```\nrows[1]", []),
        ("", []),
    ],
)
def test_what_a_reply_cites(reply: str, numbers: list[int]) -> None:
    assert cited(reply, DOCUMENTS) == [DOCUMENTS[n - 1] for n in numbers]
    assert cited(AIMessage(reply), DOCUMENTS) == cited(reply, DOCUMENTS)


def test_a_stored_reply_leads_to_its_facts_after_a_restart(tmp_path: Path, embeddings: Embeddings) -> None:
    with FactStore(tmp_path, embeddings=embeddings) as store:
        store.add("The port is 8443.", source="handbook/deploy.md", metadata={"page": 3})
        store.add("The host is ada.", source="handbook/hosts.md")
        documents = FactRetriever(store=store, k=2).invoke("What is the port?")
        node = MemoryNode(ChatDeltaMem(engine=FakeEngine()), retriever=FactRetriever(store=store, k=2))
        reply = node.invoke({"messages": [HumanMessage("What is the port?")]})["messages"][0]
        shown = cited(reply, documents)
        assert [document.page_content for document in shown] == ["The port is 8443."]
    stored: Any = AIMessage.model_validate_json(reply.model_dump_json())
    with FactStore(tmp_path, embeddings=embeddings) as store:
        assert cited(stored, store) == shown
        (named,) = cited(stored)
        assert (named.id, named.page_content) == (shown[0].id, "")
        assert named.metadata == {name: shown[0].metadata[name] for name in ("source", "score")}
        store.delete(ids=[shown[0].id])
        assert cited(stored, store) == [named]


@pytest.mark.parametrize("facts", [[{"number": "1", "id": "a"}], [{"number": 1, "id": 2}], {"1": "a"}, ["a"]])
def test_without_documents_the_reply_has_to_say_what_was_shown(facts: object) -> None:
    for reply in ("said [1]", AIMessage("said [1]", response_metadata={"facts": facts})):
        with pytest.raises(FactStoreError, match="pass the documents"):
            cited(reply)
    assert cited(AIMessage("no facts were shown [1]")) == []
    assert cited(AIMessage("said [2]", response_metadata={"facts": [{"number": 1, "id": "a"}]})) == []
