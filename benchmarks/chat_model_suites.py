"""LangChain's standard integration suite for two chat models on nano's weights; `chat_models.py` runs it.

Both have the same flags on, those of tests/langgraph/test_standard_suites.py, and no test is expected to fail. `Beside`
asks the same two about what the suite does not look at.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langchain_tests.integration_tests import ChatModelIntegrationTests
from pydantic import BaseModel

import agentmem
from agentmem.loading import NANO
from agentmem_langgraph import ChatDeltaMem

TOKENS = 100  # of a reply
torch.set_num_threads(1)


@pytest.fixture
def benchmark() -> Callable[..., Any]:
    """Calls once: the plugin that the suite times itself with is switched off."""
    return lambda function, *arguments: function(*arguments)


@pytest.fixture
def vcr() -> None:
    """Nothing is recorded: there is no traffic."""


@cache
def engine() -> agentmem.Engine:
    return agentmem.load("nano")


@cache
def pipeline() -> Any:
    """nano as a text generation pipeline that gives the reply without the prompt, greedily."""
    return importlib.import_module("langchain_huggingface").HuggingFacePipeline.from_model_id(
        model_id=str(NANO),
        task="text-generation",
        pipeline_kwargs={"max_new_tokens": TOKENS, "do_sample": False, "return_full_text": False},
    )


class Flags(ChatModelIntegrationTests):
    """What both have to show; tools, tool choice and structured output are on by default where a class has them."""

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """The same prompt again: what was read once need not be read anew."""
        llm = self.chat_model_class(**self.chat_model_params)
        llm.invoke("Hello, how are you today?")
        if not stream:
            return llm.invoke("Hello, how are you today?")
        chunks: list[Any] = list(llm.stream("Hello, how are you today?"))
        total: AIMessage = sum(chunks[1:], chunks[0])
        return total

    @property
    def supports_model_override(self) -> bool:
        return False  # another model is another ChatDeltaMem


class Trip(BaseModel):
    """A trip to plan."""

    city: str
    days: int


@tool
def get_port(city: str) -> str:
    """The port of a city."""
    return "4711"


ASK = "Call get_port with city berlin."


class Beside(ABC):
    """What the suite does not look at."""

    @abstractmethod
    def made(self) -> Any:
        """The chat model."""

    @pytest.mark.parametrize("how", ["invoke", "stream"])
    def test_a_stop_string_ends_the_reply(self, how: str) -> None:
        """A string that the model says, of several tokens where it has so many letters, is where the reply ends."""
        llm = self.made()
        whole = llm.invoke("Hello, how are you today?").text
        stop = whole.strip()[3:10]
        assert len(stop) == 7, whole
        if how == "invoke":
            cut = llm.invoke("Hello, how are you today?", stop=[stop]).text
        else:
            cut = "".join(chunk.text for chunk in llm.stream("Hello, how are you today?", stop=[stop]))
        assert cut == whole[: whole.index(stop)]

    def test_tools_reach_the_prompt(self) -> None:
        """What is said changes when there are tools."""
        with_tools, without = self.made().bind_tools([get_port]).invoke(ASK), self.made().invoke(ASK)
        assert (with_tools.text, bool(with_tools.tool_calls)) != (without.text, False)

    def test_a_forced_call_streams_as_chunks(self) -> None:
        chunks = list(self.made().bind_tools([get_port], tool_choice="get_port").stream(ASK))
        assert any(piece["name"] == "get_port" for chunk in chunks for piece in chunk.tool_call_chunks)

    @pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
    def test_structured_output_by(self, method: str) -> None:
        found = self.made().with_structured_output(Trip, method=method).invoke("Plan a trip to Oslo for 3 days.")
        assert isinstance(found, Trip)

    def test_a_batch_shares_forward_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = type(engine().model)
        rows, real = [], kind.forward

        def forward(own: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
            rows.append(input_ids.shape[0])
            return real(own, input_ids, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
        self.made().batch([f"Hello, number {n}!" for n in range(6)], {"max_concurrency": 6})
        assert max(rows) > 1, "every pass had one row"

    def test_the_profile_is_filled(self) -> None:
        profile = self.made().profile
        assert profile
        assert profile["max_input_tokens"] > 0

    def test_why_a_reply_ended_is_told(self) -> None:
        assert self.made().invoke("Hello, how are you today?").response_metadata["finish_reason"] == "stop"


class TestChatDeltaMem(Flags):
    @property
    def chat_model_class(self) -> Any:
        return ChatDeltaMem

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": engine(), "temperature": 0.0, "max_tokens": TOKENS, "cache_salt": "suite"}


class TestChatHuggingFace(Flags):
    @property
    def chat_model_class(self) -> Any:
        return importlib.import_module("langchain_huggingface").ChatHuggingFace

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"llm": pipeline()}


class TestChatDeltaMemBeside(Beside):
    def made(self) -> Any:
        return ChatDeltaMem(**TestChatDeltaMem().chat_model_params)


class TestChatHuggingFaceBeside(Beside):
    def made(self) -> Any:
        own = TestChatHuggingFace()
        return own.chat_model_class(**own.chat_model_params)
