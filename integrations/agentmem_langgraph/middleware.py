"""MemoryMiddleware: gives the model of `create_agent` the memory that the agent's state keeps."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    PrivateStateAttr,
)
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableBinding
from langgraph.types import Command

from agentmem.errors import MemoryWarning, TurnError
from agentmem.state import MemoryState
from agentmem_langgraph.channel import MemoryChannel
from agentmem_langgraph.chat_model import ChatDeltaMem
from agentmem_langgraph.memory_turn import MemoryTurn
from agentmem_langgraph.node import memory_update
from agentmem_langgraph.tracing import MATRIX_FREE, TracedAsDigest


class PrivateMemoryState(AgentState[Any]):
    """An agent's state with a memory that is not part of its input and output."""

    memory: NotRequired[Annotated[MemoryState, MemoryChannel, PrivateStateAttr]]


class SharedMemoryState(AgentState[Any]):
    """An agent's state with a memory that is part of its input and output."""

    memory: NotRequired[Annotated[MemoryState, MemoryChannel]]


class MemoryMiddleware(AgentMiddleware[Any, Any, Any]):
    """Memory for an agent whose model is a ChatDeltaMem.

        agent = create_agent(ChatDeltaMem(), tools, middleware=[MemoryMiddleware()], checkpointer=saver)

    Every call of the model is one turn of the memory, which is kept under the state key "memory". Middleware that
    retries failed calls may be placed before or after this one: a failed call changes nothing. If middleware after this
    one answers by itself (a cache, a guard, another model), the memory stays as it was, and the next turn catches up.
    If middleware after this one calls the model twice and both calls succeed, a TurnError is raised: only one can be
    the next turn.

    Args:
        shared: whether the memory is part of the agent's input and output, for an agent that is a node in a graph
            with its own "memory". Otherwise it stays inside the agent's own thread.
    """

    trace_policy = MATRIX_FREE

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.state_schema = SharedMemoryState if shared else PrivateMemoryState

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ExtendedModelResponse[Any]:
        """Call the model with the memory, and put the new one into the agent's state."""
        turn = _turn(request)
        return _with_memory(handler(_carrying(request, turn)), turn)

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ExtendedModelResponse[Any]:
        """As `wrap_model_call`."""
        turn = _turn(request)
        return _with_memory(await handler(_carrying(request, turn)), turn)


def _turn(request: ModelRequest[Any]) -> MemoryTurn:
    state: Mapping[str, Any] = request.state
    return MemoryTurn(state.get("memory"))


def _carrying(request: ModelRequest[Any], turn: MemoryTurn) -> ModelRequest[Any]:
    """The request with the memory bound to its model, so that a model that replaces it gets no memory."""
    if (model := _carrying_model(request.model, turn)) is not None:
        return request.override(model=model)
    warnings.warn(
        f"MemoryMiddleware was given {type(request.model).__name__}, which has no memory; its answer passes, and the "
        "next turn of a ChatDeltaMem catches up",
        MemoryWarning,
        stacklevel=2,
    )
    return request


def _carrying_model(model: Any, turn: MemoryTurn) -> Any:
    """The model with the memory, also under options that were bound to it; None if it is no ChatDeltaMem."""
    if isinstance(model, ChatDeltaMem):
        return model.carrying(turn)
    if isinstance(model, RunnableBinding) and (bound := _carrying_model(model.bound, turn)) is not None:
        return model.model_copy(update={"bound": bound})
    return None


def _with_memory(response: ModelResponse[Any] | AIMessage, turn: MemoryTurn) -> ExtendedModelResponse[Any]:
    if isinstance(response, AIMessage):  # middleware that answers by itself may return this
        response = ModelResponse(result=[response])
    if turn.used:
        # The model node of create_agent records this command, and takes no trace policy.
        update = memory_update(turn, "memory")
        return ExtendedModelResponse(response, Command(update=TracedAsDigest(**update) if update else {}))
    if any(isinstance(message, AIMessage) and "memory" in message.response_metadata for message in response.result):
        raise TurnError(
            "another ChatDeltaMem than the one that was given the memory has answered; put the middleware that chooses "
            "the model before MemoryMiddleware"
        )
    return ExtendedModelResponse(response)
