"""`/v1/responses` as OpenAI's client sees it: the id of a response is a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel

from tests.serve.conftest import Serve, plain

CHOOSE: Any = {
    "type": "function",
    "name": "choose",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
        "required": ["city"],
    },
    "strict": True,
}


def ask(client: OpenAI, input: Any, after: Any = None, **options: Any) -> Any:
    more = {} if after is None else {"previous_response_id": after.id}
    return client.responses.create(model="nano", input=input, **more, **options)


def streamed(client: OpenAI, input: Any, **options: Any) -> tuple[list[Any], Any]:
    """The events, and the response that the client itself puts together of them."""
    with client.responses.stream(model="nano", input=input, **options) as stream:
        return list(stream), stream.get_final_response()


def test_a_response_is_continued_gone_back_to_and_branched_from(client: OpenAI) -> None:
    first = ask(client, "My editor is helix.")
    helix = ask(client, "What is my editor?", first)
    assert (helix.status, helix.previous_response_id) == ("completed", first.id)
    assert "helix" in helix.output_text
    other = ask(client, "My editor is emacs.", first)
    assert "emacs" in ask(client, "What is my editor?", other).output_text
    assert "helix" in ask(client, "What is my editor?", first).output_text
    again = ask(client, "What is my editor?", first)
    assert again.agentmem["memory"] == helix.agentmem["memory"]
    assert again.id != helix.id


def test_a_stored_response_can_be_had_again(client: OpenAI) -> None:
    first = ask(client, "My editor is helix.", instructions="Be brief.", metadata={"k": "v"})
    second = ask(client, "What is my editor?", first)
    found = client.responses.retrieve(second.id)
    assert (found.id, found.output, found.usage) == (second.id, second.output, second.usage)
    assert found.previous_response_id == first.id
    assert first.metadata == {"k": "v"}
    for name in ("resp_nothing", second.id[:-1], first.id[:-2] + "AA", "resp_" + 32 * "0" + "dA"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            ask(client, "Hello!", previous_response_id=name)


def test_store_false_writes_nothing(serve: Serve, path: Path) -> None:
    client = serve()
    first = ask(client, "My editor is helix.")
    files = [path, path.with_name("threads.db-wal")]
    before = [file.read_bytes() for file in files]
    unstored = [ask(client, "What is my editor?", first, store=False), ask(client, "Hello!", store=False)]
    assert "helix" in unstored[0].output_text
    assert [file.read_bytes() for file in files] == before
    for response in unstored:
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)


def test_a_stream_is_the_same_response(client: OpenAI) -> None:
    first = ask(client, "My editor is helix.")
    events, final = streamed(client, "What is my editor?", previous_response_id=first.id)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    whole = ask(client, "What is my editor?", first)
    assert final.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    stored = client.responses.retrieve(final.id)
    assert (stored.output_text, stored.output[0].id) == (final.output_text, final.output[0].id)
    assert "helix" in ask(client, "What is my editor?", final).output_text


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_and_their_outputs_read(client: OpenAI, stream: bool) -> None:
    options: Any = {"tools": [CHOOSE], "tool_choice": {"type": "function", "name": "choose"}}
    response = streamed(client, "Hello!", **options)[1] if stream else ask(client, "Hello!", **options)
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "choose")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    assert ask(client, [output], response).output_text
    replayed = [{"role": "user", "content": "Hello!"}, call.to_dict(), output]
    assert ask(client, replayed, store=False).output_text


def test_replies_fit_a_schema_and_a_limit(client: OpenAI) -> None:
    class Trip(BaseModel):
        city: str
        days: int

    parsed = client.responses.parse(model="nano", input="Plan a trip.", text_format=Trip)
    assert isinstance(parsed.output_parsed, Trip)
    short = ask(client, "Tell me a story.", max_output_tokens=2)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_conversation_is_a_thread(client: OpenAI) -> None:
    ask(client, "My editor is helix.", conversation="ada")
    assert "helix" in ask(client, "What is my editor?", conversation="ada").output_text
    chat = client.chat.completions.create(
        model="nano",
        messages=[{"role": "user", "content": "What is my editor?"}],
        extra_headers={"X-Thread-Id": "ada"},
    )
    assert "helix" in str(chat.choices[0].message.content)


@pytest.mark.parametrize(
    "options",
    [
        {"input": [{"type": "web_search_call"}]},
        {"input": []},
        {"tools": [{"type": "web_search"}]},
        {"background": True},
        {"reasoning": {"effort": "high"}},
        {"conversation": "a", "extra_headers": {"X-Thread-Id": "b"}},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
    ],
)
def test_what_cannot_be_done_is_refused(client: OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "nano", "input": "Hello!", **options})
    assert caught.value.type == "invalid_request_error"


def test_what_fails_in_a_stream_is_said_in_it(client: OpenAI) -> None:
    image = [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="nano", input=image, stream=True)  # type: ignore[arg-type, call-overload]
    assert plain(client, "/v1/responses").status_code == 405


def test_langchains_client_goes_on_by_the_id(client: OpenAI) -> None:
    llm = ChatOpenAI(model="nano", base_url=str(client.base_url), api_key="none", use_previous_response_id=True)
    history: list[Any] = [("user", "My editor is helix.")]
    history += [llm.invoke(history), ("user", "What is my editor?")]
    assert "helix" in llm.invoke(history).text
