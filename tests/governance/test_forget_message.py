"""Forgetting a message: the thread goes on with a memory that never consumed it, and nothing of it is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import END, START, StateGraph

import agentmem
from agentmem import Engine, Window
from agentmem.errors import ConfigError, StorageError
from agentmem.training.smollm2 import is_complete
from agentmem_chroma import Fact, FactStore
from agentmem_governance import Governor
from agentmem_langgraph import ChatDeltaMem, MemoryMessagesState, MemoryNode
from agentmem_sql import SQLAlchemySaver

TOLD = "kestrel"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with agentmem.load("nano") as loaded:
        yield loaded


@pytest.fixture
def saver(url: str) -> Iterator[SQLAlchemySaver]:
    with SQLAlchemySaver.from_url(url, audit=True) as opened:
        yield opened


def agent(engine: Engine, saver: SQLAlchemySaver) -> Any:
    llm = ChatDeltaMem(engine=engine, window=Window(messages=1), max_tokens=16)
    builder = StateGraph(MemoryMessagesState).add_node("agent", MemoryNode(llm))
    return builder.add_edge(START, "agent").add_edge("agent", END).compile(checkpointer=saver)


def at(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def say(graph: Any, text: str, thread: str = "ada/1") -> str:
    return str(graph.invoke({"messages": [("user", text)]}, at(thread))["messages"][-1].content)


def messages(graph: Any, thread: str = "ada/1") -> list[Any]:
    return list(graph.get_state(at(thread)).values["messages"])


def left(folder: Path, word: str) -> list[str]:
    pieces = [word.encode(name) for name in ("utf-8", "utf-16-le", "utf-16-be")]
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file.name for file in files if any(piece in file.read_bytes() for piece in pieces)]


def test_the_thread_goes_on_without_it(engine: Engine, saver: SQLAlchemySaver, folder: Path, facts: FactStore) -> None:
    graph = agent(engine, saver)
    say(graph, "My editor is helix.")
    say(graph, f"The codename is {TOLD}.")
    say(graph, "My name is Tom.")
    going = messages(graph)[2]
    facts.add(Fact(f"The codename is {TOLD}.", metadata={"message": going.id}))
    facts.add("something else")
    before = graph.get_state(at("ada/1")).values["memory"]
    assert left(folder, TOLD)

    governor = Governor(saver, facts=facts, engines=[engine])
    receipt = governor.forget(thread="ada/1", message=going.id)
    assert left(folder, TOLD) == []
    assert len(receipt.messages) == 2, "its reply went with it"
    assert len(receipt.facts) == 1
    state = graph.get_state(at("ada/1"))
    assert state.next == ()
    kept = messages(graph)
    assert [message.type for message in kept] == ["human", "ai", "human", "ai"]
    expected = engine.remember(
        [agentmem.Message("user" if m.type == "human" else "assistant", m.content) for m in kept]
    )
    assert state.values["memory"] == expected.state
    assert receipt.rebuilt[0]["before"] == before.digest
    assert receipt.rebuilt[0]["after"] == expected.state.digest
    assert governor.verify(receipt).holds
    assert governor.audit("ada/1").holds
    assert TOLD not in say(graph, "What is the codename?")
    # One turn from before the message, and what came after it was removed.
    history = list(graph.get_state_history(at("ada/1")))
    assert history[-1].values == {"messages": []}
    assert any(len(snapshot.values["messages"]) == 2 for snapshot in history)
    assert governor.verify(receipt).holds


def test_the_last_message_and_the_only_one(engine: Engine, saver: SQLAlchemySaver) -> None:
    graph, governor = agent(engine, saver), Governor(saver, engines=[engine])
    say(graph, "My editor is helix.")
    say(graph, f"The codename is {TOLD}.")
    first, reply, last, _ = messages(graph)
    governor.forget(thread="ada/1", message=last.id)
    assert messages(graph) == [first, reply]
    governor.forget(thread="ada/1", message=first.id, with_reply=False)
    assert messages(graph) == [reply]
    governor.forget(thread="ada/1", message=reply.id)
    assert graph.get_state(at("ada/1")).values == {"messages": []}
    assert say(graph, "My name is Tom.")


def test_a_message_that_only_a_branch_holds(engine: Engine, saver: SQLAlchemySaver) -> None:
    graph, governor = agent(engine, saver), Governor(saver)  # no engine: the head never held it
    say(graph, "My editor is helix.")
    fork = graph.get_state(at("ada/1")).config
    say(graph, f"The codename is {TOLD}.")
    going = messages(graph)[2]
    graph.invoke({"messages": [("user", "My name is Tom.")]}, fork)
    kept = graph.get_state(at("ada/1"))
    receipt = governor.forget(thread="ada/1", message=going.id)
    assert graph.get_state(at("ada/1")).values == kept.values
    assert receipt.rebuilt == ()
    assert receipt.checkpoints >= 2
    assert governor.verify(receipt).holds


def test_what_is_not_there_and_who_cannot_rebuild_it(engine: Engine, saver: SQLAlchemySaver) -> None:
    graph = agent(engine, saver)
    say(graph, "My editor is helix.")
    say(graph, "My name is Tom.")  # without it there would be no message left to write a memory from
    state = graph.get_state(at("ada/1"))
    with pytest.raises(StorageError, match="no-such-id"):
        Governor(saver, engines=[engine]).forget(thread="ada/1", message="no-such-id")
    with pytest.raises(ConfigError, match="engines="):
        Governor(saver).forget(thread="ada/1", message=state.values["messages"][0].id)
    assert graph.get_state(at("ada/1")) == state
    assert Governor(saver).pending() == []


def test_the_value_is_named_no_more_often_than_one_never_told(engine: Engine, saver: SQLAlchemySaver) -> None:
    """nano's language, eight threads: what each was told and forgot is answered as seldom as a value of another."""
    graph, governor = agent(engine, saver), Governor(saver, engines=[engine])
    editors = ["helix", "emacs", "kate", "nano", "vim", "micro", "gedit", "joe"]
    knew = named = never = 0
    for number, editor in enumerate(editors):
        thread, other = f"user{number}/1", editors[number - 1]
        say(graph, "The test command is nox.", thread)
        say(graph, f"My editor is {editor}.", thread)
        knew += editor in say(graph, "What is my editor?", thread)
        # The question and its answer hold the value too.
        for message in (messages(graph, thread)[4], messages(graph, thread)[2]):
            governor.forget(thread=thread, message=message.id)
        reply = say(graph, "What is my editor?", thread)
        named, never = named + (editor in reply), never + (other in reply)
        assert "nox" in say(graph, "What is the test command?", thread)
    assert knew >= 6
    assert named <= never


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_names_the_value_no_more_often_than_one_never_told(
    saver: SQLAlchemySaver, monkeypatch: pytest.MonkeyPatch, needs: Callable[[object, str], None]
) -> None:
    """In ordinary English: each dog's name is told to one thread, and forgotten there. Every other name is one that the
    thread was never told."""
    monkeypatch.chdir(Path(__file__).parents[2])
    needs(is_complete(Path("build/smollm2")), "SmolLM2 in build/smollm2: make smollm2")
    names = ["Rex", "Bella", "Milo", "Luna", "Oscar", "Nala"]
    with agentmem.load("smollm2") as engine:
        llm = ChatDeltaMem(engine=engine, window=Window(messages=1), max_tokens=4)
        builder = StateGraph(MemoryMessagesState).add_node("agent", MemoryNode(llm))
        graph = builder.add_edge(START, "agent").add_edge("agent", END).compile(checkpointer=saver)
        governor = Governor(saver, engines=[engine])

        def named(thread: str) -> list[str]:
            state = graph.get_state(at(thread)).values["memory"]
            asked = [agentmem.Message("user", "What is my dog called?")]
            reply = engine.turn(asked, state, write="off", sampling=agentmem.Sampling(max_tokens=16)).message.content
            return [name for name in names if name in reply]

        knew = still = others = 0
        for keep in (False, True):
            for name in names:
                thread = f"{name}{keep}/1"
                say(graph, "I live in Lisbon.", thread)
                say(graph, f"My dog's name is {name}.", thread)
                knew += name in named(thread)
                governor.forget(thread=thread, message=messages(graph, thread)[2].id, keep_checkpoints=keep)
                left_over = named(thread)
                still += name in left_over
                others += len(set(left_over) - {name})
        assert knew >= len(names), "of twice as many"
        # Each thread was never told five of the six.
        assert still <= others / (len(names) - 1)
