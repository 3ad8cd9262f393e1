"""A question put to a memory, and to what would answer without it: four ways, side by side.

The prompt shows the question alone (and the conversation's system messages), except for the arm that shows the whole
conversation. What is asked is not kept: the state that a turn returns is dropped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from agentmem.errors import ConfigError, StateMismatchError
from agentmem.messages import Message
from agentmem.state import MemoryState
from agentmem_inspect.contents import Place
from agentmem_langgraph.messages import to_engine

if TYPE_CHECKING:
    from agentmem import Engine

Arm = Literal["memory", "other", "zero", "whole"]

ARMS: dict[Arm, str] = {
    "memory": "The memory of this checkpoint",
    "other": "The memory of another checkpoint",
    "zero": "The memory set to zero",
    "whole": "The whole conversation in the prompt, no memory",
}

MOST_TOKENS = 512
_SECONDS = 120.0  # of one answer


@dataclass(frozen=True)
class Answer:
    """What one arm answered.

    Attributes:
        text: the reply.
        prompt, reply: tokens of the prompt and of the reply.
        seconds: from the call to the complete reply.
        cut: whether the prompt could not show all of the conversation.
    """

    text: str
    prompt: int
    reply: int
    seconds: float
    cut: bool


def check_arm(name: str) -> Arm:
    """The arm of this name.

    Raises:
        ConfigError: there is none.
    """
    arms = {str(arm): arm for arm in ARMS}
    if name not in arms:
        raise ConfigError(f"expected an arm out of {', '.join(ARMS)}, found {name!r}")
    return arms[name]


def fits(engine: Engine, state: MemoryState) -> str | None:
    """Why an engine cannot read a memory; None if it can."""
    if not engine.has_memory:
        return "The model that is loaded has no adapter. Start again with the one that wrote this memory."
    zero = engine.zero_state()
    try:
        state.require(zero.model_fingerprint, zero.adapter_fingerprint, zero.shape)
    except StateMismatchError as error:
        return f"This memory belongs to another model or adapter than the one that is loaded. {error}."
    return None


def ask(
    engine: Engine, arm: Arm, question: str, place: Place, state: MemoryState | None, max_tokens: int = 64
) -> Answer:
    """The answer of one arm.

    Args:
        engine: answers.
        arm: how.
        question: the question.
        place: the checkpoint whose conversation it is.
        state: the memory to answer with; the arms that use none ignore it.
        max_tokens: most tokens of the reply.

    Raises:
        ConfigError: there is no question; `max_tokens` is out of range; or the arm needs a memory and there is none.
        StateMismatchError: the memory belongs to another model or adapter.
    """
    from agentmem import ConsumedRecord, Sampling, Window

    if not question.strip():
        raise ConfigError("expected a question, found none")
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise ConfigError(f"expected 1 to {MOST_TOKENS} tokens, found {max_tokens}")
    # Of several lists, the longest: the others are drafts and parts of it.
    told = to_engine(max(place.messages.values(), key=len, default=()))
    asked, sampling = Message("user", question), Sampling(max_tokens=max_tokens)
    started = time.perf_counter()
    if arm == "whole":
        history, window = [*told, asked], Window(tokens=None)
        turn = engine.turn(history, window=window, sampling=sampling, memory=False, timeout=_SECONDS)
        cut = turn.usage.input_tokens < engine.count_tokens(history)
    else:
        if arm == "zero":
            state = engine.zero_state()
        if state is None:
            raise ConfigError("expected a checkpoint with a memory, found one without; choose another")
        if reason := fits(engine, state):
            raise StateMismatchError(reason)
        # With its record emptied, since the history of this turn begins with the question.
        state = state.replaced(record=ConsumedRecord.empty())
        history = [*(each for each in told if each.role == "system"), asked]
        window = Window(messages=1)
        turn, cut = engine.turn(history, state, window=window, sampling=sampling, timeout=_SECONDS), False
    seconds = time.perf_counter() - started
    return Answer(turn.message.content, turn.usage.input_tokens, turn.usage.output_tokens, seconds, cut)
