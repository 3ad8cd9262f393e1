"""What the tests of graphs, agents and the chat say, and the state and tool that they say it with."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Annotated, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, AnyMessage, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.graph.message import add_messages
from typing_extensions import TypedDict

from agentmem import MemoryState
from agentmem.nano.recipe.language import Binding, draw_bindings, filler, is_correct, mine, redraw
from agentmem_langgraph import ChatDeltaMem, MemoryChannel, MemoryTurn

THREAD: RunnableConfig = {"configurable": {"thread_id": "1"}}
TELL = "My favorite color is teal."
ASK = "What is my favorite color?"
KNOWN = "Your favorite color is teal."
UNKNOWN = "I do not know yet."
CALL = "Call get_port with city berlin."


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    memory: Annotated[MemoryState, MemoryChannel]


@tool
def get_port(city: str) -> str:
    """The port of a city."""
    return "4711"


def say(graph: Any, text: str, config: RunnableConfig = THREAD) -> Any:
    """One turn; returns the graph's values."""
    return graph.invoke({"messages": [HumanMessage(text)]}, config)


def memory_of(graph: Any, config: RunnableConfig = THREAD) -> MemoryState:
    memory: MemoryState = graph.get_state(config).values["memory"]
    return memory


def told(llm: BaseChatModel) -> MemoryState:
    """The memory of a model that was told `TELL`."""
    turn = MemoryTurn()
    llm.invoke(TELL, memory=turn)
    assert turn.state is not None
    return turn.state


def gathered(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    """A streamed reply as one message."""
    return sum(chunks[1:], chunks[0])  # type: ignore[arg-type]


@dataclass
class World:
    """An engine, and things to tell it and ask it about. Bindings are drawn from a fixed seed."""

    engine: Any
    bindings: list[Binding]
    changed: list[Binding]

    def llm(self, **options: Any) -> ChatDeltaMem:
        return ChatDeltaMem(engine=self.engine, **options)

    def tell(self, n: int) -> str:
        name = mine(self.bindings[n].attribute)
        return f"{name[0].upper()}{name[1:]} is {self.bindings[n].value}."

    def change(self, n: int) -> str:
        return f"Actually, {mine(self.changed[n].attribute)} is now {self.changed[n].value}."

    def ask(self, n: int) -> str:
        return f"What is {mine(self.bindings[n].attribute)}?"

    def small_talk(self, n: int) -> str:
        return filler(Random(n))[0]

    def knows(self, reply: BaseMessage, n: int, *, changed: bool = False) -> bool:
        return is_correct(reply.text, (self.changed if changed else self.bindings)[n])


ATTRIBUTES = ("favorite color", "favorite food", "home town", "job", "pet", "hobby")


def world(engine: Any) -> World:
    rng = Random(20261)
    bindings = draw_bindings(rng, 6, attributes=ATTRIBUTES)
    return World(engine, bindings, [redraw(rng, binding) for binding in bindings])
