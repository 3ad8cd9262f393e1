"""What LangGraph's Agent Server is given: a graph with memory, and the checkpointer for its threads.

`langgraph.json` names both.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from langgraph.graph import START, MessagesState, StateGraph

from agentmem import Window
from agentmem_langgraph import ChatDeltaMem, MemoryMessagesState, MemoryNode
from agentmem_sql import SQLAlchemySaver

# A window of one message, to show that answers come from the memory; leave it out with a model of your own.
llm = ChatDeltaMem(model=os.environ.get("MODEL", "nano"), max_tokens=60, window=Window(messages=1))
node = MemoryNode(llm)

# Runs take and give messages alone; the memory stays between the node and the checkpoints.
builder = StateGraph(MemoryMessagesState, input_schema=MessagesState, output_schema=MessagesState)
builder.add_node("agent", node, trace_policy=node.trace_policy)
builder.add_edge(START, "agent")
graph = builder.compile()  # without a checkpointer: the server adds its own


@asynccontextmanager
async def saver() -> AsyncIterator[SQLAlchemySaver]:
    """The server's checkpointer, opened when the server starts and closed when it ends."""
    async with SQLAlchemySaver.from_url(os.environ.get("THREADS_URL", "sqlite:///threads.db")) as opened:
        yield opened
