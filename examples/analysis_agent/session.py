"""One session of the analyst, in a process of its own: definitions, or work with them.

    python -m analysis_agent.session NUMBER SETUP          NUMBER: 0 tells, 1 and 2 work; SETUP: a `Setup` as JSON

Nothing goes from one to the next but the files in `Setup.data`. A working session leaves its outcome there as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, RemoveMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END
from langgraph.graph.message import REMOVE_ALL_MESSAGES

from agentmem_chroma import FactRetriever, FactStore, cited, local_embeddings
from agentmem_sql import SQLAlchemySaver
from analysis_agent import phrases
from analysis_agent.agent import Agent, build_agent, chat_model
from analysis_agent.tools import Analysis

THREAD = "analyst"


@dataclass(frozen=True)
class Setup:
    """What all sessions are given.

    Attributes:
        data: a folder with `sales.csv`, for the database, the facts and the plot.
        memory: False: the same, with the model's memory off.
    """

    data: str
    model: str = "nano"
    adapter: str | None = None
    memory: bool = True


@dataclass
class Outcome:
    """How a session went.

    Attributes:
        right: each request, with whether its call was right.
        answer: the reply to the question.
        facts: the exact facts that it cites.
        sources: their queries.
    """

    right: dict[str, bool] = field(default_factory=dict)
    answer: str = ""
    facts: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


class _Shown(BaseCallbackHandler):
    """Keeps what the retriever found, in the order in which the model saw it numbered."""

    def __init__(self) -> None:
        self.documents: list[Document] = []

    def on_retriever_end(self, documents: Sequence[Document], **_: Any) -> None:
        self.documents = list(documents)


@contextmanager
def opened(setup: Setup) -> Iterator[Agent]:
    """The agent, over the table, the facts and the threads of the folder."""
    data = Path(setup.data)
    with ExitStack() as stack:
        store = stack.enter_context(FactStore(data / "facts", embeddings=local_embeddings()))
        analysis = Analysis(data / "sales.csv", store, data)
        stack.callback(analysis.close)
        saver = stack.enter_context(SQLAlchemySaver.from_url(f"sqlite:///{data / 'threads.db'}"))
        llm = chat_model(setup.model, setup.adapter, use_memory=setup.memory)
        stack.callback(llm.close)
        retriever = FactRetriever(store=store, k=3, min_score=0.5)
        yield build_agent(llm, analysis.all(), retriever, saver, nano=setup.model == "nano")


def tell(setup: Setup) -> None:
    """Session one: the definitions."""
    with opened(setup) as agent:
        for text in phrases.definitions(phrases.Terms()):
            _say(agent, [HumanMessage(text)], _thread())


def work(setup: Setup, number: int) -> Outcome:
    """A later session: the conversation is cleared, the memory and the facts stay.

    Each request is a branch of the thread from where the definitions ended: what it calls and what comes back leaves no
    trace in the memory of the next one, and does not crowd out the definitions.
    """
    outcome, requests = Outcome(), phrases.requests(phrases.Terms())
    cleared = RemoveMessage(id=REMOVE_ALL_MESSAGES)
    with opened(setup) as agent:
        head = agent.get_state(_thread())
        print(f"  process {os.getpid()}")
        for step in phrases.SESSIONS[number - 1]:
            if step in requests:
                request = requests[step]
                said, _ = _say(agent, [cleared, HumanMessage(request.text)], head.config)
                calls = [call for message in said if isinstance(message, AIMessage) for call in message.tool_calls]
                found = (calls[0]["name"], calls[0]["args"]) if calls else None
                outcome.right[request.text] = found == (request.tool, request.arguments)
            else:
                said, documents = _say(agent, [cleared, HumanMessage(phrases.question(step))], head.config)
                outcome.answer = said[-1].text
                found_facts = cited(outcome.answer, documents)
                outcome.facts = [document.page_content for document in found_facts]
                outcome.sources = [str(document.metadata["source"]) for document in found_facts]
                for source in outcome.sources:
                    print(f"     source: {source}")
        # The thread goes on from where it was, in the next session.
        agent.update_state(head.config, None, as_node=END)
    return outcome


def _thread() -> RunnableConfig:
    return RunnableConfig(configurable={"thread_id": THREAD})


def _say(agent: Agent, said: Sequence[BaseMessage], base: RunnableConfig) -> tuple[list[AnyMessage], list[Document]]:
    """One turn from a checkpoint on; the messages since the human spoke, and the facts that were shown."""
    shown = _Shown()
    config = RunnableConfig(configurable=base["configurable"], callbacks=[shown])
    given: Any = {"messages": said}
    messages = agent.invoke(given, config)["messages"]
    start = max(i for i, message in enumerate(messages) if isinstance(message, HumanMessage))
    for message in messages[start:]:
        _show(message)
    return messages[start:], shown.documents


def _show(message: AnyMessage) -> None:
    if isinstance(message, AIMessage) and message.tool_calls:
        for call in message.tool_calls:
            arguments = ", ".join(f"{name}={value!r}" for name, value in call["args"].items())
            print(f"  agent calls {call['name']}({arguments})")
    else:
        print(f"  {({'human': 'analyst', 'ai': 'agent', 'tool': '  result'})[message.type]}: {message.text}")


def main() -> None:
    """See the module."""
    number, setup = int(sys.argv[1]), Setup(**json.loads(sys.argv[2]))
    if not number:
        tell(setup)
        return
    outcome = work(setup, number)
    (Path(setup.data) / f"outcome-{number}.json").write_text(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
