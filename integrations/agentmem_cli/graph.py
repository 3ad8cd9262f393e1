"""The agent that `demo` and `chat` run: one node with a memory, exact facts, and threads in a SQLite file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import StateSnapshot
from sqlalchemy import URL

from agentmem.errors import ConfigError
from agentmem_chroma import FactRetriever, FactStore, facts_block, local_embeddings
from agentmem_langgraph import ChatDeltaMem, MemoryMessagesState, MemoryNode
from agentmem_sql import SQLAlchemySaver

NODE = "agent"

# For the embedded sentence model: a question and its fact score above 0.8, anything else in this language below 0.65.
_MIN_SCORE = 0.7
_SHOWN_FACTS = 3


Agent = CompiledStateGraph[MemoryMessagesState, None, MemoryMessagesState, MemoryMessagesState]


def build_agent(
    llm: ChatDeltaMem, saver: BaseCheckpointSaver[str], retriever: FactRetriever | None = None, system: str = ""
) -> Agent:
    """The graph: a single memory node. Retrieved facts are shown to the model, never stored and never written."""
    nano = llm.engine is not None and llm.engine.name == "nano"
    node = MemoryNode(llm, system=system, retriever=retriever, format_facts=facts_block if nano else _facts_to_cite)
    builder = StateGraph(MemoryMessagesState)
    builder.add_node(NODE, node, trace_policy=node.trace_policy)
    builder.add_edge(START, NODE)
    builder.add_edge(NODE, END)
    return builder.compile(checkpointer=saver)


def open_threads(db: str | Path) -> SQLAlchemySaver:
    """The threads in a database, given as a URL or as the path of a SQLite file, which is created on first use.

    The database cannot make this process run code, whoever wrote it: values of types other than messages and plain data
    are left as data.

    Raises:
        ConfigError: `db` is blank, which SQLite would take for a database in memory.
    """
    if not str(db).strip():
        raise ConfigError(f"a database is a SQLite file or a URL; found {db!r}; sqlite:// keeps threads in memory only")
    url = db if isinstance(db, str) and "://" in db else URL.create("sqlite", database=str(db))
    return SQLAlchemySaver.from_url(url, serde=JsonPlusSerializer(allowed_msgpack_modules=None))


def open_facts(directory: Path | str) -> FactStore:
    """The exact facts in a directory, or at a Chroma server's address, searched with a model that needs no download.

    An index that was damaged when a process was killed is rebuilt.

    Raises:
        StoreOwnedError, FactStoreError: see `FactStore`.
    """
    return FactStore(directory, embeddings=local_embeddings(), rebuild=True)


def retriever_of(store: FactStore) -> FactRetriever:
    """A retriever that finds the few facts that a question is about, and none for other messages."""
    return FactRetriever(store=store, k=_SHOWN_FACTS, min_score=_MIN_SCORE)


def thread(name: str, *callbacks: BaseCallbackHandler) -> RunnableConfig:
    """The config of a thread."""
    return RunnableConfig(configurable={"thread_id": name}, callbacks=list(callbacks))


def set_head(agent: Agent, snapshot: StateSnapshot) -> None:
    """Make an earlier snapshot of a thread its newest again; what came after stays in the history."""
    agent.update_state(snapshot.config, None, as_node=END)


class ShownFacts(BaseCallbackHandler):
    """Collects what a run's retriever found, in the order in which it was numbered for the model."""

    def __init__(self) -> None:
        self.documents: list[Document] = []

    def on_retriever_end(self, documents: Sequence[Document], *, run_id: UUID, **_: Any) -> None:
        self.documents = list(documents)


def _facts_to_cite(documents: Sequence[Document]) -> str:
    """The facts, with instructions for citing them: for models that, unlike nano, were not trained to."""
    return f"{facts_block(documents)}\nAnswer in one sentence; cite the number of the fact that you use, like [1]."
