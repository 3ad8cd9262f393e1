"""No async path blocks its event loop: BlockBuster, which `langgraph dev` runs too, watches all of Python's calls.

Nothing is left out: a blocking call of any library on these paths counts, whoever made it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from blockbuster import BlockingError, blockbuster_ctx
from langchain.agents import create_agent
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import HumanMessage
from langgraph.graph import START, StateGraph
from langgraph.types import Send
from pydantic import BaseModel

from agentmem import Engine, Window
from agentmem_chroma import FactRetriever, FactStore
from agentmem_langgraph import ChatDeltaMem, MemoryMiddleware, MemoryNode, MemoryTurn
from agentmem_sql import SQLAlchemySaver
from tests.helpers.talks import ASK, TELL, THREAD, State, get_port


class Trip(BaseModel):
    """A trip."""

    city: str
    days: int


@pytest.fixture
def llm(nano_engine: Engine) -> ChatDeltaMem:
    return ChatDeltaMem(engine=nano_engine, max_tokens=40, window=Window(messages=1))


@pytest.fixture
async def saver(tmp_path: Path) -> AsyncIterator[SQLAlchemySaver]:
    async with SQLAlchemySaver.from_url(f"sqlite:///{tmp_path / 'threads.db'}") as made:
        yield made


@pytest.fixture
def facts(tmp_path: Path) -> Iterator[FactStore]:
    with FactStore(path=tmp_path / "facts", embeddings=DeterministicFakeEmbedding(size=16)) as store:
        store.add(["The retry limit is 300."], source="manual")
        yield store


@asynccontextmanager
async def watched() -> AsyncIterator[None]:
    with blockbuster_ctx():
        yield


async def test_a_blocking_call_would_be_found(tmp_path: Path) -> None:
    async with watched():
        with pytest.raises(BlockingError):
            os.listdir(tmp_path)


async def test_the_chat_model(llm: ChatDeltaMem) -> None:
    async with watched():
        turn = MemoryTurn()
        await llm.ainvoke(TELL, memory=turn)
        chunks = [chunk async for chunk in llm.astream(ASK, memory=MemoryTurn(turn.state))]
        assert "teal" in "".join(chunk.text for chunk in chunks)
        assert len(await llm.abatch([ASK] * 5)) == 5
        await llm.aremember([("user", TELL)], memory=MemoryTurn())
        assert [event async for event in llm.astream_events(ASK, version="v2")]
        task = asyncio.create_task(llm.bind(stop=["never"], temperature=1.0).ainvoke(TELL))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_tools_and_structured_output(llm: ChatDeltaMem) -> None:
    async with watched():
        assert isinstance(await llm.with_structured_output(Trip).ainvoke("Plan a trip.", max_tokens=90), Trip)
        assert (await llm.bind_tools([get_port], tool_choice="any").ainvoke("Hello!", max_tokens=60)).tool_calls


async def test_a_model_that_is_loaded_on_first_use() -> None:
    async with watched():
        llm = ChatDeltaMem(model="nano", max_tokens=5)
        await asyncio.gather(llm.ainvoke(TELL), ChatDeltaMem(model="nano", max_tokens=5).ainvoke(TELL))
    llm.close()


async def test_a_graph_with_facts_and_a_database(llm: ChatDeltaMem, saver: SQLAlchemySaver, facts: FactStore) -> None:
    node = MemoryNode(llm, system="Be brief.", retriever=FactRetriever(store=facts))
    builder = StateGraph(State).add_node("agent", node, trace_policy=node.trace_policy).add_edge(START, "agent")
    async with watched():
        graph = builder.compile(checkpointer=saver)
        await graph.ainvoke({"messages": [HumanMessage(TELL)]}, THREAD)
        async for _ in graph.astream({"messages": [HumanMessage(ASK)]}, THREAD, stream_mode=["messages", "updates"]):
            pass
        before = [one async for one in graph.aget_state_history(THREAD)]
        assert before[0].values["memory"].count == 4
        await graph.aupdate_state(THREAD, {"memory": None})
        await saver.adelete_thread("1")


async def test_parallel_branches(llm: ChatDeltaMem, saver: SQLAlchemySaver) -> None:
    def fan_out(state: State) -> list[Send]:
        told = {"messages": [HumanMessage(TELL)]}
        return [Send("branch", {**told, "memory": state["memory"].to_dict()}) for _ in range(3)]

    node = MemoryNode(llm)
    builder = StateGraph(State).add_node("first", node).add_node("branch", node).add_edge(START, "first")
    builder.add_conditional_edges("first", fan_out, ["branch"])
    async with watched():
        out = await builder.compile(checkpointer=saver).ainvoke({"messages": [HumanMessage("Hello!")]}, THREAD)
    assert len(out["messages"]) == 5


async def test_an_agent(llm: ChatDeltaMem, saver: SQLAlchemySaver) -> None:
    async with watched():
        agent = create_agent(llm, [get_port], middleware=[MemoryMiddleware()], checkpointer=saver)
        await agent.ainvoke({"messages": [HumanMessage(TELL)]}, THREAD)
        out = await agent.ainvoke({"messages": [HumanMessage(ASK)]}, THREAD)
    assert "teal" in out["messages"][-1].text


async def test_the_fact_store(facts: FactStore) -> None:
    async with watched():
        await facts.aadd(["The limit is 7."], source="manual")
        assert await FactRetriever(store=facts).ainvoke("What is the limit?")
        assert await facts.acount() == 2
