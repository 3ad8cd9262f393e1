"""A stream of `/v1/responses`: each item of the output is announced, sent in pieces, and sent again as a whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

from langchain_core.messages import AIMessageChunk
from starlette.requests import Request

from agentmem_langgraph.messages import REASONING
from agentmem_serve.errors import api_error
from agentmem_serve.items import call_item, message_item, reasoning_item, text_part
from agentmem_serve.streams import event
from agentmem_serve.turns import Begun, Event, Finished

Fields = dict[str, Any]


class OutputEvents:
    """The events of an output, as a reply's chunks come in.

    Attributes:
        output: the items so far, complete but for the last.
    """

    def __init__(self, reply_id: str) -> None:
        self.output: list[Fields] = []
        self._reply_id = reply_id
        self._open: tuple[str, int | None] | None = None  # kind and, of a call, number of the last item

    def of(self, chunk: AIMessageChunk) -> Iterator[tuple[str, Fields]]:
        """The events of a chunk: type and fields."""
        if reasoning := chunk.additional_kwargs.get(REASONING):
            yield from self._begin("reasoning", None, reasoning_item(f"rs_{self._reply_id}", ""))
            self.output[-1]["content"][0]["text"] += reasoning
            yield self._piece("reasoning_text.delta", delta=reasoning, content_index=0)
        if chunk.text:
            yield from self._begin("message", None, message_item(self._reply_id, "", "in_progress"))
            part = self.output[-1]["content"]
            if not part:
                part.append(text_part(""))
                yield self._piece("content_part.added", part=text_part(""), content_index=0)
            part[0]["text"] += chunk.text
            yield self._piece("output_text.delta", delta=chunk.text, content_index=0, logprobs=[])
        for call in chunk.tool_call_chunks:
            begun = call_item(call["id"] or "", call["name"] or "", "", "in_progress")
            yield from self._begin("function_call", call["index"], begun)
            if call["args"]:
                self.output[-1]["arguments"] += call["args"]
                yield self._piece("function_call_arguments.delta", delta=call["args"])

    def _begin(self, kind: str, number: int | None, item: Fields) -> Iterator[tuple[str, Fields]]:
        if self._open == (kind, number):
            return
        yield from self.end("completed")
        self._open = kind, number
        self.output.append(item)
        yield "output_item.added", {"output_index": len(self.output) - 1, "item": _copy(item)}

    def end(self, status: str) -> Iterator[tuple[str, Fields]]:
        """The events that complete the last item."""
        if self._open is None:
            return
        kind, item = self._open[0], self.output[-1]
        if kind == "reasoning":
            yield self._piece("reasoning_text.done", text=item["content"][0]["text"], content_index=0)
        else:
            item["status"] = status
        if kind == "message":
            part = item["content"][0]
            yield self._piece("output_text.done", text=part["text"], content_index=0, logprobs=[])
            yield self._piece("content_part.done", part=part, content_index=0)
        elif kind == "function_call":
            yield self._piece("function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        yield "output_item.done", {"output_index": len(self.output) - 1, "item": item}
        self._open = None

    def _piece(self, kind: str, **fields: Any) -> tuple[str, Fields]:
        return kind, {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, **fields}


async def response_events(
    request: Request,
    described: Callable[[str | None], Fields],
    completed: Callable[[Fields, Finished], Fields],
    events: AsyncIterator[Event],
) -> AsyncGenerator[bytes]:
    """The stream.

    Args:
        request: what is answered.
        described: the response as it begins, by its checkpoint.
        completed: the same with its answer.
        events: of the turn.
    """
    number = 0

    def made(kind: str, fields: Fields) -> bytes:
        nonlocal number
        name = f"response.{kind}"
        data = event({"type": name, "sequence_number": number, **fields}, name)
        number += 1
        return data

    response: Fields = {}
    output = OutputEvents("")
    try:
        async for one in events:
            if isinstance(one, Begun):
                response, output = described(one.checkpoint), OutputEvents(one.reply_id)
                yield made("created", {"response": response})
                yield made("in_progress", {"response": response})
            elif isinstance(one, AIMessageChunk):
                for kind, fields in output.of(one):
                    yield made(kind, fields)
            else:
                done = completed(response, one)
                if one.repeated:  # there were no chunks
                    for kind, fields in output.of(AIMessageChunk(content=one.reply.text)):
                        yield made(kind, fields)
                for kind, fields in output.end(done["status"]):
                    yield made(kind, fields)
                whole = {**done, "output": output.output or done["output"]}
                yield made(done["status"], {"response": whole})
    except Exception as error:  # noqa: BLE001 - the status is sent already: whatever it is, the client gets it here
        failed = api_error(error, request.state.id)
        code = failed.code or failed.kind
        wrong = {"status": "failed", "error": {"code": code, "message": str(failed)}}
        yield made("failed", {"response": {**response, **wrong}})


def _copy(item: Fields) -> Fields:
    content = item.get("content")
    return {**item, **({"content": [dict(part) for part in content]} if content is not None else {})}
