"""`/v1/chat/completions` as OpenAI's client and LangChain's see it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel

from agentmem_serve.parameters import conversation_of
from tests.serve.conftest import Serve, plain, say, text_of

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["city"],
        },
    },
}


def streamed(client: OpenAI, **options: Any) -> Any:
    """A streamed completion, put together by the client itself."""
    with client.chat.completions.stream(model="nano", **options) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion()


def test_a_thread_is_remembered_and_a_request_without_one_is_not(client: OpenAI) -> None:
    told = say(client, "My editor is helix.", "ada")
    assert told.object == "chat.completion"
    assert told.agentmem["thread_id"] == "ada"
    assert told.usage.total_tokens == told.usage.prompt_tokens + told.usage.completion_tokens > 0
    assert "helix" in text_of(say(client, "What is my editor?", "ada"))
    assert "helix" not in text_of(say(client, "What is my editor?", "ben"))
    assert "helix" not in text_of(say(client, "What is my editor?"))
    by_metadata = say(client, "What is my editor?", metadata={"thread_id": "ada"})
    assert "helix" in text_of(by_metadata)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stateless_request_carries_its_own_history(client: OpenAI, stream: bool) -> None:
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "My editor is helix."}]},
        {"role": "assistant", "content": "Noted, your editor is helix."},
        {"role": "user", "content": "What is my editor?"},
    ]
    make = streamed if stream else lambda client, **o: client.chat.completions.create(model="nano", **o)
    options = {"stream_options": {"include_usage": True}} if stream else {}
    reply = make(client, messages=messages, **options)
    assert "helix" in text_of(reply)
    assert reply.usage.completion_tokens > 0
    assert reply.choices[0].finish_reason == "stop"


def test_a_streamed_turn_is_the_same_turn(client: OpenAI) -> None:
    for thread, options in (("a", {}), ("b", {"stream": True})):
        said = say(client, "My editor is helix.", thread, **options)
        if options:
            chunks = list(said)
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == text_of(
                say(client, "My editor is helix.")
            )
            assert chunks[-1].agentmem["memory"]["written"] > 0
    ends = [say(client, "What is my editor?", thread).agentmem["memory"]["digest"] for thread in "ab"]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_and_their_results_read(client: OpenAI, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hello!"}]
    make: Any = streamed if stream else lambda client, **o: client.chat.completions.create(model="nano", **o)
    reply = make(
        client, messages=messages, tools=[WEATHER], tool_choice="required", extra_headers={"X-Thread-Id": "tools"}
    )
    (call,) = reply.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    assert reply.choices[0].finish_reason == "tool_calls"
    answer: Any = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    for history in ([answer], [*messages, reply.choices[0].message.to_dict(), answer]):
        # Alone, the result continues the thread; with the history, it is the same turn once more.
        again = client.chat.completions.create(
            model="nano", messages=history, tools=[WEATHER], extra_headers={"X-Thread-Id": "tools"}
        )
        assert "edits" not in again.agentmem


def test_replies_fit_a_schema(client: OpenAI) -> None:
    class Trip(BaseModel):
        city: str
        days: int

    messages: Any = [{"role": "user", "content": "Plan a trip."}]
    parsed = client.chat.completions.parse(model="nano", messages=messages, response_format=Trip)
    assert isinstance(parsed.choices[0].message.parsed, Trip)
    as_json = say(client, "Hello!", response_format={"type": "json_object"})
    assert isinstance(json.loads(text_of(as_json)), dict)


def test_options_are_kept_to(client: OpenAI) -> None:
    short = say(client, "Tell me a story.", max_tokens=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)
    whole = text_of(say(client, "My editor is helix."))
    assert text_of(say(client, "My editor is helix.", stop=["helix"])) == whole[: whole.index("helix")]
    drawn = [text_of(say(client, "Hello!", temperature=2, seed=seed)) for seed in (1, 1)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("options", "kind", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError, None),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"n": 2}, openai.BadRequestError, "n"),
        ({"max_tokens": 4000}, openai.BadRequestError, "max_completion_tokens"),
        ({"frequency_penalty": 1}, openai.BadRequestError, "frequency_penalty"),
        ({"extra_body": {"flavour": "mint"}}, openai.BadRequestError, "flavour"),
        ({"tools": [WEATHER], "tool_choice": "nothing"}, openai.BadRequestError, None),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, None),
        ({"metadata": {"thread_id": ""}}, openai.BadRequestError, "X-Thread-Id"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_form(
    client: OpenAI, options: dict[str, Any], kind: type[openai.APIStatusError], param: str | None
) -> None:
    request: Any = {"model": "nano", "messages": [{"role": "user", "content": "Hello!"}], **options}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**request)
    with pytest.raises(kind):
        client.chat.completions.create(**{**request, "stream": True})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id.startswith("req_")


def test_models_health_and_request_ids(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").owned_by == "agentmem"
    for path in ("/healthz", "/readyz"):
        assert plain(client, path, headers={"X-Request-Id": "mine"}).headers["X-Request-Id"] == "mine"
    missing = plain(client, "/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    say(client, "Hello!")
    counted = plain(client, "/metrics").text
    assert 'agentmem_requests_total{route="/healthz",status="200"} 1.0' in counted
    assert float(counted.partition('agentmem_tokens_total{kind="reply"} ')[2].split()[0]) > 0


def test_langchains_client_speaks_to_it(client: OpenAI) -> None:
    llm = ChatOpenAI(
        model="nano",
        base_url=str(client.base_url),
        api_key="none",
        default_headers={"X-Thread-Id": "langchain"},
        stream_usage=True,
    )
    told: list[Any] = [("user", "My editor is helix.")]
    reply = llm.invoke(told)
    chunks = list(llm.stream([*told, reply, ("user", "What is my editor?")]))
    assert "helix" in "".join(str(chunk.content) for chunk in chunks)
    assert any(chunk.usage_metadata for chunk in chunks)
    (call,) = llm.bind_tools([WEATHER], tool_choice="any").invoke("Hello!").tool_calls
    assert call["name"] == "weather"


def test_a_server_whose_database_is_away_says_so(serve: Serve, tmp_path: Any) -> None:
    client = serve(at=f"sqlite:///{tmp_path / 'here.db'}")
    say(client, "My editor is helix.", "ada")
    for file in tmp_path.glob("here.db*"):
        file.rename(file.with_name("away" + file.name))
    with pytest.raises(openai.InternalServerError) as caught:
        say(client, "What is my editor?", "ada")
    assert (caught.value.status_code, caught.value.code) == (503, "storage")
    assert caught.value.response.headers["Retry-After"] == "1"
    assert str(tmp_path) not in str(caught.value)
    assert plain(client, "/readyz").status_code == 503
    assert plain(client, "/healthz").status_code == 200
    for file in tmp_path.glob("awayhere.db*"):
        file.rename(file.with_name(file.name.removeprefix("away")))
    assert "helix" in text_of(say(client, "What is my editor?", "ada"))


def test_a_conversation_is_read_beside_the_event_loop(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 messages take seconds, in which other requests are to be answered."""
    beside = []

    def read(*arguments: Any) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            beside.append(True)
        return conversation_of(*arguments)

    for module in ("chat", "responses"):
        monkeypatch.setattr(f"agentmem_serve.{module}.conversation_of", read)
    say(client, "Hello!")
    client.responses.create(model="nano", input="Hello!")
    assert beside == [True, True]
