"""The demo's two processes: one states things and ends; the other opens the thread and asks.

    python -m agentmem_cli.phases tell|ask SETUP          SETUP: a `Setup` as JSON

Nothing passes between them but the files in `Setup.data`. `ask` writes its scores to `scores.json`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.types import StateSnapshot
from rich.console import Console

from agentmem import MemoryState, Window
from agentmem.nano.recipe.language import Binding
from agentmem_chroma import FactStore, cited
from agentmem_cli import graph, tables
from agentmem_cli.options import SHIPPED
from agentmem_cli.scores import Arm, Score, Setup, write_scores
from agentmem_cli.script import Script, draw_script, is_right
from agentmem_cli.terminal import hide_library_warnings, one_line_errors
from agentmem_langgraph import ChatDeltaMem, MemoryMessagesState

THREAD, OTHER = "demo", "other"

# The prompt shows only the latest message, so that whatever is recalled later was never read again.
_LAST_MESSAGE = Window(messages=1)
# Our own answer in one sentence; another model may reason first.
_MAX_TOKENS_SHIPPED, _MAX_TOKENS = 48, 1024


@dataclass(frozen=True)
class Workplace:
    """The objects that a phase works with.

    Attributes:
        agent: the graph; its prompt shows retrieved facts and the last message only.
        llm: the chat model in `agent`.
        store: the exact facts.
    """

    agent: graph.Agent
    llm: ChatDeltaMem
    store: FactStore


@contextmanager
def opened(setup: Setup, console: Console) -> Iterator[Workplace]:
    """Model, threads and facts, open for one phase."""
    with ExitStack() as stack:
        with console.status("loading the model"):
            engine = stack.enter_context(setup.loading.load())
        saver = stack.enter_context(graph.open_threads(setup.threads))
        store = stack.enter_context(graph.open_facts(setup.facts))
        limit = _MAX_TOKENS_SHIPPED if setup.loading.model in SHIPPED else _MAX_TOKENS
        llm = ChatDeltaMem(engine=engine, window=_LAST_MESSAGE, max_tokens=limit)
        retriever = graph.retriever_of(store)
        yield Workplace(graph.build_agent(llm, saver, retriever), llm, store)


def tell(setup: Setup, console: Console) -> None:
    """Fill the fact store, and send both threads the messages of the script, turn by turn."""
    script = draw_script(setup.seed, setup.loading.model)
    with opened(setup, console) as work:
        for sourced in script.facts:
            work.store.add(sourced.fact.sentence, source=sourced.source)
        turns = _tell_thread(work, THREAD, script.said, console)
        _tell_thread(work, OTHER, script.other, console)
        console.print(tables.conversation(turns, script.change))
        console.print(tables.left_behind(_memory(work.agent, THREAD), len(script.other), len(script.facts)))


def ask(setup: Setup, console: Console) -> None:
    """Ask everything, with the thread's memory and with both controls; cite a fact; rewind."""
    script = draw_script(setup.seed, setup.loading.model)
    with opened(setup, console) as work:
        head = work.agent.get_state(graph.thread(THREAD))
        memory = _memory(work.agent, THREAD)
        console.print(tables.opened(os.getpid(), len(head.values["messages"]), memory))
        foreign = _memory(work.agent, OTHER)
        arms: dict[Arm, StateSnapshot] = {
            "memory": head,
            "zeroed": _copy(work.agent, head, "zeroed", memory.replaced(matrices=np.zeros_like(memory.matrices))),
            "foreign": _copy(work.agent, head, "foreign", memory.replaced(matrices=foreign.matrices)),
        }
        with console.status("asking"):
            replies = {
                arm: [_say(work.agent, base.config, question) for question, _ in script.questions]
                for arm, base in arms.items()
            }
        rows = [
            tables.Row(question, binding, replies["memory"][i], _replayed(work, head, question))
            for i, (question, binding) in enumerate(script.questions)
        ]
        console.print(tables.answers(rows))
        console.print(tables.controls(rows, replies["zeroed"], replies["foreign"], script.elsewhere))
        cites = _exact_fact(work, head, script, console)
        rewound = _rewound(work, head, script, console)
        # The thread must not continue from one of the branches above.
        graph.set_head(work.agent, head)
    held = [binding for _, binding in script.questions]
    write_scores(setup, {arm: _score(said, held) for arm, said in replies.items()}, cites, rewound)


def _tell_thread(work: Workplace, name: str, said: tuple[str, ...], console: Console) -> list[tuple[str, AIMessage]]:
    turns = []
    with console.status("") as status:
        for number, text in enumerate(said, start=1):
            status.update(f"thread {name!r}: turn {number} of {len(said)}")
            turns.append((text, _say(work.agent, graph.thread(name), text)))
    return turns


def _say(agent: graph.Agent, config: RunnableConfig, text: str) -> AIMessage:
    """One turn: in the thread, or, with a checkpoint's config, in a branch of its own."""
    given: MemoryMessagesState = {"messages": [HumanMessage(text)]}
    reply = agent.invoke(given, config)["messages"][-1]
    assert isinstance(reply, AIMessage)
    return reply


def _memory(agent: graph.Agent, name: str) -> MemoryState:
    state = agent.get_state(graph.thread(name)).values["memory"]
    assert isinstance(state, MemoryState)
    return state


def _copy(agent: graph.Agent, head: StateSnapshot, name: str, memory: MemoryState) -> StateSnapshot:
    """A thread with the same messages and the same record of what was consumed, but other matrices."""
    agent.update_state(
        graph.thread(name), {"messages": head.values["messages"], "memory": memory.to_dict()}, as_node=graph.NODE
    )
    return agent.get_state(graph.thread(name))


def _replayed(work: Workplace, head: StateSnapshot, question: str) -> int:
    """The number of tokens in a prompt that replays the whole conversation."""
    messages: list[AnyMessage] = [*head.values["messages"], HumanMessage(question)]
    return work.llm.get_num_tokens_from_messages(messages)


def _exact_fact(work: Workplace, head: StateSnapshot, script: Script, console: Console) -> bool:
    shown = graph.ShownFacts()
    config = RunnableConfig(configurable=head.config["configurable"], callbacks=[shown])
    with console.status("asking for an exact fact"):
        reply = _say(work.agent, config, script.fact_question)
    sources = [document.metadata["source"] for document in cited(reply, shown.documents)]
    right = script.asked_fact.fact.value in reply.text and script.asked_fact.source in sources
    console.print(tables.exact_fact(script.fact_question, shown.documents, reply, sources, right))
    return right


def _rewound(work: Workplace, head: StateSnapshot, script: Script, console: Console) -> bool:
    """Ask for the changed fact, at the head and at the last finished turn before the change."""
    earlier = next(
        snapshot
        for snapshot in work.agent.get_state_history(graph.thread(THREAD))
        if not snapshot.next and script.change not in [m.text for m in snapshot.values["messages"]]
    )
    question = next(q for q, binding in script.questions if binding == script.new)
    with console.status("rewinding"):
        answers = [_say(work.agent, at.config, question) for at in (earlier, head)]
    rights = [is_right(a.text, b) for a, b in zip(answers, (script.old, script.new), strict=True)]
    moments = [tables.Moment(len(s.values["messages"]), str(s.created_at)) for s in (earlier, head)]
    console.print(tables.rewound(script.change, question, moments, answers, rights))
    return all(rights)


def _score(replies: list[AIMessage], held: list[Binding]) -> Score:
    right = sum(is_right(reply.text, binding) for reply, binding in zip(replies, held, strict=True))
    return Score(right, len(held))


def main(phase: str, setup: str) -> None:
    """Run one phase."""
    {"tell": tell, "ask": ask}[phase](Setup.from_json(setup), Console())


if __name__ == "__main__":
    hide_library_warnings()
    with one_line_errors():
        main(*sys.argv[1:])
