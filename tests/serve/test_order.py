"""Requests of one thread: how they line up with what it holds, and in which order replicas store them.

Two applications with a saver each know of each other as little as two processes do: what orders them is the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.base.id import UUID, uuid6
from openai import OpenAI

from agentmem import Engine, MemoryState
from agentmem_langgraph import ChatDeltaMem
from agentmem_serve.errors import ThreadConflict
from agentmem_serve.threads import Threads, checkpoint_id_after
from agentmem_serve.turns import TurnRequest, Turns
from agentmem_sql import SQLAlchemySaver
from tests.serve.conftest import Serve, say, text_of

HELIX: list[Any] = [
    {"role": "user", "content": "My editor is helix."},
    {"role": "assistant", "content": "Noted, your editor is helix."},
]
ZEBRA: Any = {"role": "user", "content": "My codename is zebra."}
ASKED: Any = {"role": "user", "content": "What is my editor?"}


@pytest.fixture
def threads(url: str) -> Iterator[Threads]:
    """What is in the test's database."""
    with SQLAlchemySaver.from_url(url) as saver:
        yield Threads(saver)


def held(threads: Threads, thread: str = "t") -> list[str]:
    """What a thread holds, as a list of texts."""
    return [str(message.content) for message in asyncio.run(threads.read(thread)).messages]


def send(client: OpenAI, messages: list[Any], thread: str = "t", **options: Any) -> Any:
    headers = {"X-Thread-Id": thread, **options.pop("extra_headers", {})}
    return client.chat.completions.create(model="nano", messages=messages, extra_headers=headers, **options)


def as_sent(client: OpenAI, messages: list[Any], thread: str = "t") -> list[Any]:
    """The conversation after another message, as a client keeps it that sends all of it."""
    reply = send(client, messages, thread).choices[0].message
    return [*messages, {"role": "assistant", "content": reply.content}]


def test_sending_everything_or_its_end_or_what_is_new_is_the_same(client: OpenAI, threads: Threads) -> None:
    digests = []
    for thread, kept in (("all", 100), ("end", 1), ("new", 0)):
        history: list[Any] = []
        for said in ("My editor is helix.", "OK.", "OK.", "What is my editor?"):
            shown = history[-kept:] if kept else []
            history = [*history, *as_sent(client, [*shown, {"role": "user", "content": said}], thread)[len(shown) :]]
        assert "helix" in history[-1]["content"]
        assert held(threads, thread) == [message["content"] for message in history]
        memory: Any = asyncio.run(threads.read(thread)).memory
        digests.append(memory["digest"])
    assert len(set(digests)) == 1


def test_a_reply_made_again_leaves_no_trace_of_the_first(client: OpenAI, threads: Threads) -> None:
    history = as_sent(client, HELIX[:1])
    first = send(client, [*history, ZEBRA], temperature=2, seed=1)
    again = send(client, [*history, ZEBRA], temperature=2, seed=2)
    assert held(threads) == [*(message["content"] for message in [*history, ZEBRA]), text_of(again)]
    undisturbed = as_sent(client, HELIX[:1], "other")
    other = send(client, [*undisturbed, ZEBRA], "other", temperature=2, seed=2)
    assert again.agentmem["memory"]["digest"] == other.agentmem["memory"]["digest"]
    assert first.agentmem["memory"]["digest"] != other.agentmem["memory"]["digest"]
    edited = send(client, [*history, ASKED])
    assert "helix" in text_of(edited)
    assert "My codename is zebra." not in held(threads)


def test_another_version_without_a_checkpoint_is_aligned_by_the_record(client: OpenAI, threads: Threads) -> None:
    history = as_sent(client, [*as_sent(client, HELIX[:1]), ZEBRA])
    summary: Any = {"role": "user", "content": "The test command is nox."}
    reply = send(client, [summary, *history[2:], ASKED])
    assert reply.agentmem["edits"] == [0]
    assert "helix" in text_of(reply), "what the summary replaced stays in the memory"
    assert held(threads)[0] == summary["content"]


def test_nothing_is_stored_where_the_request_says_so(client: OpenAI, threads: Threads) -> None:
    say(client, "My editor is helix.", "t")
    before = asyncio.run(threads.read("t")).id
    assert "helix" in text_of(send(client, [ASKED], store=False))
    assert asyncio.run(threads.read("t")).id == before


def test_a_request_that_comes_again_with_its_key_is_answered_once(client: OpenAI, threads: Threads) -> None:
    key = {"Idempotency-Key": "one"}
    first, second = (send(client, HELIX[:1], extra_headers=key) for _ in range(2))
    streamed = list(send(client, HELIX[:1], extra_headers=key, stream=True))
    assert text_of(first) == text_of(second) == "".join(c.choices[0].delta.content or "" for c in streamed)
    assert second.agentmem["repeated"] is True
    assert held(threads) == [HELIX[0]["content"], text_of(first)]


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
def test_replicas_that_take_turns_and_that_answer_at_once_lose_nothing(serve: Serve, database_url: str) -> None:
    replicas = [serve(at=database_url), serve(at=database_url)]
    for number in range(4):
        assert text_of(say(replicas[number % 2], f"The test command is nox{number}.", "t"))
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(say, replicas[number % 2], f"Hello number {number}.", "t") for number in range(12)]
        said = [text_of(call.result()) for call in calls]
    with SQLAlchemySaver.from_url(database_url) as saver:
        texts = held(Threads(saver))
        snapshot = asyncio.run(Threads(saver).read("t"))
    assert len(texts) == 2 * (4 + 12)
    assert sorted(texts[9::2]) == sorted(said)
    assert set(texts[8::2]) == {f"Hello number {number}." for number in range(12)}
    assert snapshot.memory is not None
    assert MemoryState.from_dict(snapshot.memory).count == len(texts)


def test_a_stream_that_was_overtaken_fails_and_stores_nothing(engine: Engine, url: str) -> None:
    async def race(ours: SQLAlchemySaver, theirs: SQLAlchemySaver) -> list[str]:
        llm = ChatDeltaMem(engine=engine, max_tokens=20)
        turns, others = (Turns(llm, saver, 60, lambda: None) for saver in (ours, theirs))
        stream = turns.stream(
            TurnRequest(messages=ChatDeltaMem._convert_input(llm, "Hello!").to_messages(), thread="t")
        )
        for _ in range(2):  # it has begun to speak
            await anext(stream)
        await others.complete(TurnRequest(messages=[HumanMessage("My editor is helix.")], thread="t"))
        with pytest.raises(ThreadConflict):
            async for _ in stream:
                pass
        return [str(message.content) for message in (await turns.threads.read("t")).messages]

    with SQLAlchemySaver.from_url(url) as ours, SQLAlchemySaver.from_url(url) as theirs:
        assert asyncio.run(race(ours, theirs))[0] == "My editor is helix."


def test_a_client_that_goes_away_ends_its_turn(client: OpenAI, threads: Threads) -> None:
    stream = say(client, "Tell me a story.", "t", stream=True)
    next(iter(stream))
    stream.close()
    long = {"role": "user", "content": "My editor is helix. " * 2000}  # not answered before the client goes, anywhere
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.02).chat.completions.create(
            model="nano", messages=[long], extra_headers={"X-Thread-Id": "t"}
        )
    reply = send(client, [ASKED])
    assert held(threads) in (["What is my editor?", text_of(reply)],), "neither turn before was acknowledged"


def test_ids_sort_after_the_newest_whatever_the_clock_says() -> None:
    ahead = UUID(int=uuid6().int + (1 << 90))
    for newest in (None, str(uuid6()), str(ahead)):
        made = checkpoint_id_after(newest)
        assert newest is None or made > newest
        assert UUID(made).version == 6
