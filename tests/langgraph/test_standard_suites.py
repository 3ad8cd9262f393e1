"""LangChain's own suites for chat models, with the embedded model through its real code path.

Skipped are what a text model has not (images, audio, PDF) and what needs a server (keys from the environment, recorded
traffic).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from agentmem_langgraph import ChatDeltaMem

# No keys to send, and no server whose failures could be tried again.
_OF_SERVERS = ("api_key", "max_retries")


@pytest.fixture
def benchmark() -> Callable[..., Any]:
    """Calls once: the plugin that the suites time themselves with is switched off."""
    return lambda function, *arguments: function(*arguments)


@pytest.fixture
def vcr() -> None:
    """Nothing is recorded: there is no traffic."""


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatDeltaMem]:
        return ChatDeltaMem

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "nano"}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        given = super().standard_chat_model_params
        return {name: value for name, value in given.items() if name not in _OF_SERVERS}

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestIntegration(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _loaded(self, nano_engine: Any) -> None:
        type(self)._engine = nano_engine

    _engine: Any = None

    @property
    def chat_model_class(self) -> type[ChatDeltaMem]:
        return ChatDeltaMem

    @property
    def chat_model_params(self) -> dict[str, Any]:
        """One engine for the whole class; from a name, every test would load one."""
        return {"engine": self._engine, "temperature": 0.0, "max_tokens": 100}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:  # type: ignore[override]
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """The same prompt again: its prefill is at hand."""
        llm = ChatDeltaMem(**self.chat_model_params, cache_salt="suite")
        llm.invoke("Hello, how are you today?")
        if not stream:
            return llm.invoke("Hello, how are you today?")
        chunks = list(llm.stream("Hello, how are you today?"))
        return sum(chunks[1:], chunks[0])

    @property
    def supports_model_override(self) -> bool:
        return False  # another model is another ChatDeltaMem
