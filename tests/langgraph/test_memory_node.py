"""MemoryNode: what it shows the model, what it leaves out of the state, and which state forms it reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import Field

from agentmem import MemoryState
from agentmem.errors import ConfigError, TranscriptError, TurnError
from agentmem_langgraph import (
    ChatDeltaMem,
    MemoryChannel,
    MemoryMessagesState,
    MemoryNode,
    MemoryWarning,
    numbered_facts,
)
from tests.helpers.fake_engine import FakeEngine

HELLO = {"messages": [HumanMessage("Hello!")]}


class Shelf(BaseRetriever):
    """Returns its documents, and keeps what it was asked."""

    documents: list[Document]
    asked: list[str] = Field(default_factory=list)

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        self.asked.append(query)
        return self.documents


@pytest.fixture
def shelf() -> Shelf:
    facts = ["The retry limit is 300.", "The api gate is\nblue."]
    return Shelf(
        documents=[Document(facts[0]), Document(facts[1], id="gate", metadata={"source": "wiki", "score": 0.5})]
    )


def shown(fake: FakeEngine) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in fake.calls[-1]["messages"]]


def test_it_returns_the_reply_and_the_plain_memory(llm: ChatDeltaMem) -> None:
    update = MemoryNode(llm).invoke(HELLO)
    assert [m.type for m in update["messages"]] == ["ai"]
    assert MemoryState.from_dict(update["memory"]).count == 2
    again = MemoryNode(llm).invoke({"messages": [HumanMessage("Good bye!")], "memory": update["memory"]})
    assert again["memory"]["count"] == 4


def test_keys_can_be_named(llm: ChatDeltaMem) -> None:
    update = MemoryNode(llm, messages_key="talk", memory_key="osam").invoke({"talk": [HumanMessage("Hello!")]})
    assert set(update) == {"talk", "osam"}
    with pytest.raises(TranscriptError, match="talk"):
        MemoryNode(llm, messages_key="talk").invoke(HELLO)


def test_a_state_may_be_an_object(llm: ChatDeltaMem) -> None:
    @dataclass
    class State:
        messages: list[Any]
        memory: MemoryState | None = None

    update = MemoryNode(llm).invoke(State([HumanMessage("Hello!")]))
    memory = MemoryState.from_dict(update["memory"])
    assert MemoryNode(llm).invoke(State([HumanMessage("Good bye!")], memory))["memory"]["count"] == 4


def test_bound_models_carry_the_memory_too(fake: FakeEngine, llm: ChatDeltaMem) -> None:
    update = MemoryNode(llm.bind(max_tokens=3).with_config(tags=["x"])).invoke(HELLO)
    assert update["memory"]["count"] == 2
    assert fake.calls[-1]["sampling"].max_tokens == 3


@pytest.mark.parametrize(
    ("chain", "advice"),
    [
        (lambda llm: llm | StrOutputParser(), "StrOutputParser.*parse the reply in a node behind it"),
        (lambda llm: llm.bind(max_tokens=3) | StrOutputParser(), "StrOutputParser"),
        (
            lambda llm: RunnableLambda(lambda messages: messages) | llm,
            "begins with RunnableLambda, which does not pass",
        ),
        (lambda llm: RunnablePassthrough() | (StrOutputParser() | llm.bind(max_tokens=3)), "begins with Runnable"),
        (lambda llm: llm.with_structured_output({"title": "x", "type": "object", "properties": {}}), "Parser"),
        (lambda llm: ChatPromptTemplate.from_messages([("user", "{x}")]) | llm, "system='...'"),
        (
            lambda llm: llm.with_structured_output({"title": "x", "type": "object"}, include_raw=True),
            "RunnableParallel",
        ),
        (lambda llm: (llm | StrOutputParser()).with_retry(), "StrOutputParser"),
        (lambda llm: llm | StrOutputParser().with_retry(), "StrOutputParser"),
        (lambda llm: (llm | RunnableLambda(lambda reply: reply)).with_retry() | StrOutputParser(), "StrOutputParser"),
        (lambda llm: RunnableParallel(reply=llm) | RunnableLambda(lambda made: made["reply"]), "RunnableParallel"),
        (lambda llm: "nano", r"found 'nano'; write MemoryNode\(ChatDeltaMem"),
        (lambda llm: type(llm), "found <class"),
    ],
    ids=[
        "parser",
        "bound",
        "function",
        "sequence",
        "structured",
        "prompt",
        "raw",
        "retry",
        "tried",
        "both",
        "dict",
        "name",
        "class",
    ],
)
def test_a_chain_that_loses_message_or_memory_is_refused_when_the_node_is_made(
    llm: ChatDeltaMem, fake: FakeEngine, chain: Any, advice: str
) -> None:
    with pytest.raises(ConfigError, match=advice):
        MemoryNode(chain(llm))
    assert not fake.calls


def test_what_is_no_message_does_not_get_into_the_state(llm: ChatDeltaMem) -> None:
    with pytest.raises(TurnError, match="adds a message to its state; its model gave int"):
        MemoryNode(llm | RunnableLambda(lambda reply: len(reply.text))).invoke(HELLO)


def test_a_reply_may_be_signed_behind_the_model(llm: ChatDeltaMem) -> None:
    def sign(reply: AIMessage) -> AIMessage:
        reply.name = "expert"
        return reply

    node = MemoryNode(llm | RunnableLambda(sign))
    first = node.invoke(HELLO)
    history = [*HELLO["messages"], *first["messages"], HumanMessage("Go on.")]
    second = node.invoke({"messages": history, "memory": first["memory"]})
    assert first["messages"][0].name == "expert"
    assert second["memory"]["count"] == 4
    assert "edits" not in second["messages"][0].response_metadata


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_graph_without_a_key_for_the_memory_is_refused(
    llm: ChatDeltaMem, fake: FakeEngine, is_async: bool
) -> None:
    class Misspelt(MessagesState):
        memmory: Annotated[MemoryState, MemoryChannel]

    for schema in (MessagesState, Misspelt):
        graph = StateGraph(schema).add_node("agent", MemoryNode(llm)).add_edge(START, "agent").compile()
        with pytest.raises(ConfigError, match="MemoryMessagesState"):
            await graph.ainvoke(HELLO) if is_async else graph.invoke(HELLO)
    assert not fake.calls


def test_the_ready_state_holds_messages_and_memory(llm: ChatDeltaMem) -> None:
    node = MemoryNode(llm)
    graph = StateGraph(MemoryMessagesState).add_node("agent", node).add_edge(START, "agent").compile()
    first = graph.invoke(HELLO)
    assert first["memory"].count == 2
    stored = json.loads(json.dumps(first["memory"].to_json()))
    second = graph.invoke({"messages": [*first["messages"], HumanMessage("Go on.")], "memory": stored})
    assert second["memory"].count == 4


def test_a_graph_that_calls_the_model_without_its_memory_is_told_once(llm: ChatDeltaMem) -> None:
    def agent(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node("agent", agent).add_edge(START, "agent").compile()
    out = graph.invoke(HELLO)
    with pytest.warns(MemoryWarning, match="without memory="):
        out = graph.invoke({"messages": [*out["messages"], HumanMessage("Go on.")]})
    graph.invoke({"messages": [*out["messages"], HumanMessage("Go on.")]})  # a second warning would be an error


def test_a_model_that_ignores_the_memory_is_refused() -> None:
    with pytest.raises(TurnError, match="ChatDeltaMem"):
        MemoryNode(FakeListChatModel(responses=["hi"])).invoke(HELLO)


def test_a_model_without_memory_leaves_the_memory_out(llm: ChatDeltaMem) -> None:
    bare = MemoryNode(llm.model_copy(update={"use_memory": False}))
    assert set(bare.invoke(HELLO)) == {"messages"}
    memory = MemoryNode(llm).invoke(HELLO)["memory"]
    assert bare.invoke({**HELLO, "memory": memory})["memory"] == memory


@pytest.mark.parametrize("is_async", [False, True])
async def test_facts_are_shown_in_the_leading_system_message(
    fake: FakeEngine, llm: ChatDeltaMem, shelf: Shelf, is_async: bool
) -> None:
    node = MemoryNode(llm, system="Be brief.", retriever=shelf)
    state = {"messages": [HumanMessage("Hello!"), HumanMessage("What is the retry limit?")]}
    update = await node.ainvoke(state) if is_async else node.invoke(state)
    assert shelf.asked[-1] == "What is the retry limit?"
    facts = "Facts:\nThe retry limit is 300. [1]\nThe api gate is blue. [2]"
    assert shown(fake)[0] == ("system", f"Be brief.\n\n{facts}")
    assert update["messages"][0].response_metadata["facts"] == [
        {"number": 1, "id": None, "source": None, "score": None},
        {"number": 2, "id": "gate", "source": "wiki", "score": 0.5},
    ]
    assert update["messages"][0].text == "The retry limit is 300. [1]"
    # Neither stored nor recorded: two human messages and the reply.
    assert [m.type for m in update["messages"]] == ["ai"]
    assert update["memory"]["count"] == 3


def test_a_system_message_of_the_history_stays_in_one_with_the_facts(
    fake: FakeEngine, llm: ChatDeltaMem, shelf: Shelf
) -> None:
    node = MemoryNode(llm, system="A", retriever=shelf, format_facts=lambda documents: f"{len(documents)} facts")
    node.invoke({"messages": [SystemMessage("B"), HumanMessage("Hello!")]})
    assert shown(fake) == [("system", "A\n\nB\n\n2 facts"), ("user", "Hello!")]


def test_without_system_and_facts_the_history_is_shown_as_it_is(fake: FakeEngine, llm: ChatDeltaMem) -> None:
    MemoryNode(llm, retriever=Shelf(documents=[])).invoke(HELLO)
    assert shown(fake) == [("user", "Hello!")]


def test_a_fact_can_not_pretend_to_be_another() -> None:
    facts = numbered_facts([Document("a\n[2] b"), Document("c")])
    assert facts.splitlines() == ["Facts:", "a [2] b [1]", "c [2]"]
    assert numbered_facts([]) == ""
