"""Parameters that both endpoints have: what is understood, what is ignored, and what a turn makes of them.

A parameter that would change the reply and that this server has not is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, Any, Literal

from langchain_core.messages import BaseMessage, convert_to_messages
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from agentmem_serve.errors import ApiError
from agentmem_serve.line_up import without_system

MOST_ID = 512  # characters of a thread's id

THREAD_HEADER, THREAD_KEY = "X-Thread-Id", "thread_id"

Zero = Annotated[float, Field(ge=0, le=0)]


class Parameters(BaseModel):
    """What a request of either endpoint may say."""

    model_config = ConfigDict(extra="forbid")

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: int | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    # These say something about who asks, or how OpenAI runs it, and change no reply.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    stream_options: dict[str, Any] | None = None

    # These would change it, so that only their neutral values will do.
    top_logprobs: Zero | None = None

    def common_options(self) -> dict[str, Any]:
        """The options of a call to the chat model that are spelled alike in both endpoints."""
        names = ("temperature", "top_p", "top_k", "seed", "parallel_tool_calls")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class ChatParameters(Parameters):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    response_format: dict[str, Any] | None = None

    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None

    def options(self, most_tokens: int) -> dict[str, Any]:
        """All options of a call to the chat model."""
        limit = self.max_completion_tokens or self.max_tokens
        named = {"stop": self.stop, "tools": self.tools or None, "response_format": self.response_format}
        named["tool_choice"] = self.tool_choice if self.tools else None
        options = {name: value for name, value in named.items() if value is not None}
        return {**self.common_options(), **options, "max_tokens": tokens_within(limit, most_tokens)}


def tokens_within(asked: int | None, most: int) -> int:
    """How long a reply may be.

    Raises:
        ApiError: longer than this server makes them.
    """
    if asked is not None and asked > most:
        raise ApiError(
            400, f"a reply has at most {most} tokens here, found {asked}; ask for fewer", param="max_completion_tokens"
        )
    return asked or most


def conversation_of(messages: Sequence[dict[str, Any]], param: str) -> tuple[str, list[BaseMessage]]:
    """The system text and the other messages of a request, which may be in any form of OpenAI's.

    Raises:
        ApiError: they are not, or there is none.
    """
    try:
        system, conversation = without_system(convert_to_messages(messages))
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise ApiError(400, f"expected messages with a role and content, found others: {error}", param=param) from error
    if not conversation:
        raise ApiError(400, "expected a message that is no system message, found none", param=param)
    # Ids would be stored, and two messages might have the same; notes about a turn are the server's to make.
    ours: dict[str, Any] = {"id": None, "response_metadata": {}}
    return system, [message.model_copy(update=ours) for message in conversation]


def thread_of(request: Request, metadata: dict[str, Any] | None) -> str | None:
    """The thread that a request names, by header or metadata.

    Raises:
        ApiError: it names two, or none that can be used.
    """
    by_header, by_metadata = request.headers.get(THREAD_HEADER), (metadata or {}).get(THREAD_KEY)
    if by_header is not None and by_metadata is not None and by_header != by_metadata:
        message = f"{THREAD_HEADER} names the thread {by_header!r}, and metadata.{THREAD_KEY} another; name one"
        raise ApiError(400, message, param=f"metadata.{THREAD_KEY}")
    name = by_metadata if by_header is None else by_header
    return None if name is None else checked_id(name, THREAD_HEADER)


def checked_id(name: Any, param: str) -> str:
    """A thread's id.

    Raises:
        ApiError: it is no text, empty, or too long.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MOST_ID:
        raise ApiError(400, f"expected a thread's id of 1 to {MOST_ID} characters, found {name!r:.80}", param=param)
    return name


def retry_key(request: Request) -> str | None:
    """A digest of the request's `Idempotency-Key`, if it has one."""
    key = request.headers.get("Idempotency-Key")
    return None if not key else sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]
