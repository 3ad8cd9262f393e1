"""The chat keeps threads in its file, compares with the base model, changes its window, resets, and loses nothing."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langgraph.checkpoint.base import copy_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from agentmem import Delta, Window
from agentmem.errors import ConfigError
from agentmem_chroma import FactRetriever, FactStore
from agentmem_cli.chat import Settings
from agentmem_cli.graph import build_agent, open_threads, thread
from agentmem_cli.options import parse_window
from agentmem_langgraph import ChatDeltaMem
from agentmem_sql import SQLAlchemySaver
from tests.helpers.cli_talk import IdealEngine, Payload, Talk
from tests.helpers.talks import ASK, KNOWN, TELL, UNKNOWN


def messages(talk: Talk) -> list[str]:
    """What the thread's newest checkpoint holds."""
    with open_threads(talk.db) as saver:
        agent = build_agent(ChatDeltaMem(engine=talk.engine), saver)
        state = agent.get_state(thread(talk.thread))
        assert not state.next
        return [message.text for message in state.values.get("messages", [])]


def test_recalls_beyond_the_window(talk: Talk) -> None:
    assert talk(TELL, "Hello!", ASK).count(KNOWN) == 2
    assert [len(call["messages"]) for call in talk.engine.calls] == [1, 3, 5]
    assert all(call["window"] == Window(messages=1) for call in talk.engine.calls)


def test_threads_go_on_where_they_were_left(talk: Talk) -> None:
    talk(TELL)
    assert KNOWN in talk(ASK)
    talk.thread = "another"
    assert UNKNOWN in talk(ASK)


def test_what_is_not_said_to_the_model(talk: Talk) -> None:
    shown = talk("", "   ", "/help", "/forget", "/memory maybe", "/window wide", "/quit", "Hello!")
    assert messages(talk) == []
    for command in ("/reset", "/stats", "/window", "/memory on", "/memory off", "/quit"):
        assert command in shown
    assert "/forget is no command" in shown
    assert "ConfigError: /memory takes on or off; found 'maybe'" in shown
    assert shown.count("ConfigError") == 2


def test_reset_forgets_messages_memory_and_history(talk: Talk) -> None:
    shown = talk(TELL, "/reset", "/stats", ASK)
    assert "the memory is empty" in shown
    assert UNKNOWN in shown
    assert messages(talk) == [ASK, UNKNOWN]
    with open_threads(talk.db) as saver:
        texts = {m.text for saved in saver.list(None) for m in saved.checkpoint["channel_values"].get("messages", [])}
    assert TELL not in texts


def test_stats(talk: Talk) -> None:
    assert "the memory is empty" in talk("/stats")
    shown = talk(TELL, "/stats")
    assert "Your" in talk.writes
    assert KNOWN not in talk.writes, "replies are streamed"
    assert "2 messages consumed" in shown
    assert "effective rank" in shown
    assert "1.000" in shown  # one fact is one direction of norm 1


def test_memory_off_is_beside_the_thread(talk: Talk) -> None:
    shown = talk(TELL, "/memory off", "/memory", ASK, "/stats", "/memory on", ASK, "/memory")
    off, on = shown.split("memory on: back")
    assert UNKNOWN in off
    assert "memory is off" in off
    assert "2 messages consumed" in off
    assert KNOWN in on
    assert "memory is on" in on
    assert messages(talk)[2:] == [ASK, KNOWN]


def test_the_window_is_changed_inside(talk: Talk) -> None:
    shown = talk(TELL, "/window", "/window 4m", ASK, "/memory off", "Hello!", "/window 4096", "Hello!", "/memory on")
    windows = [call["window"] for call in talk.engine.calls]
    assert windows == [Window(messages=1), *[Window(messages=4)] * 2, Window(tokens=4096)]
    for said in ("the last message\n", "the last 4 messages", "the last 4096 tokens"):
        assert said in shown
    # What the base model was told is still there when its window changes.
    assert [len(call["messages"]) for call in talk.engine.calls] == [1, 3, 5, 7]
    assert messages(talk)[0::2] == [TELL, ASK]


@pytest.mark.parametrize(("name", "window"), [("nano", Window(messages=1)), ("other", Window(tokens=4096))])
def test_the_usual_window(talk: Talk, name: str, window: Window) -> None:
    talk.settings = Settings()
    talk.engine.name = name
    talk(TELL)
    assert talk.engine.calls[0]["window"] == window


def test_the_greeting_says_what_runs_and_what_to_try(talk: Talk) -> None:
    shown = talk()
    for said in ("model fake (float32 on cpu)", "adapter the model's own", "the last message;", f"Try: {TELL}", ASK):
        assert said in shown
    assert "Try:" not in talk(TELL, "/quit").partition(">")[2]
    assert "Try:" not in talk()


def test_settings_reach_the_model(talk: Talk) -> None:
    talk.settings = Settings("1m", "Be brief.", 7, 0.5)
    talk(TELL)
    (call,) = talk.engine.calls
    assert (call["sampling"].max_tokens, call["sampling"].temperature) == (7, 0.5)
    assert [m.content for m in call["messages"]] == ["Be brief.", TELL]
    assert messages(talk)[0] == TELL


def test_one_question(talk: Talk) -> None:
    talk(TELL)
    assert talk.answer(ASK) == f"{KNOWN}\n"
    assert messages(talk)[0::2] == [TELL, ASK]
    talk.engine.failures = 1
    with pytest.raises(RuntimeError):
        talk.answer(ASK)
    assert messages(talk)[0::2] == [TELL, ASK]


def test_a_bare_model(talk: Talk) -> None:
    talk.engine.has_memory = False
    talk.settings = Settings("2m")
    shown = talk(TELL, "/stats", "/memory off")
    for said in ("adapter none, so no memory", "this model has no memory", "ConfigError"):
        assert said in shown
    assert "Try:" not in shown
    assert talk.engine.calls[0]["memory"] is False
    assert messages(talk)[0] == TELL


def test_somebody_elses_database_runs_no_code(talk: Talk) -> None:
    talk(TELL)
    permissive = JsonPlusSerializer(allowed_msgpack_modules=True)
    with SQLAlchemySaver.from_url(f"sqlite:///{talk.db}", serde=permissive) as saver:
        newest = saver.get_tuple(thread(talk.thread))
        assert newest is not None
        checkpoint = copy_checkpoint(newest.checkpoint)
        checkpoint["id"] = str(uuid6())
        version = checkpoint["channel_versions"]["trap"] = saver.get_next_version(None, None)
        checkpoint["channel_values"]["trap"] = Payload("put there")
        saver.put(newest.config, checkpoint, newest.metadata, {"trap": version})
        Payload.made.clear()
        saver.get_tuple(thread(talk.thread))
    assert Payload.made == ["put there"]
    Payload.made.clear()
    assert KNOWN in talk(ASK)
    assert Payload.made == []


ESCAPES = "\x1b[2J\x1b]52;c;aGVsbG8=\x07\x9b31m\u202e"


def test_no_control_sequence_reaches_the_terminal(talk: Talk, tmp_path: Path) -> None:
    talk.thread = f"evil{ESCAPES}"
    talk.engine.scripted.append([Delta(f"said {ESCAPES}"), Delta(" and a fact [1]")])
    with FactStore(tmp_path / "facts", embeddings=DeterministicFakeEmbedding(size=8)) as store:
        store.add(f"A fact {ESCAPES} ends.", source=f"file{ESCAPES}")
        talk.retriever = FactRetriever(store=store, k=1)
        shown = talk("Hello!", f"/unknown{ESCAPES}", f"/memory {ESCAPES}")
    assert shown.count("\\x1b]52;") == 6
    assert not set(shown) & set(ESCAPES) - set("[2J]52;c;aGVsbG8=31m")


def test_a_failed_turn_leaves_the_thread(talk: Talk) -> None:
    talk(TELL)
    before = messages(talk)
    talk.engine.failures = 1
    assert "the model failed" in talk(ASK)
    assert messages(talk) == before
    assert KNOWN in talk(ASK)


class Interrupted(IdealEngine):
    """Ctrl-C arrives while the reply is under way."""

    interrupt = False

    def astream(self, *args: Any, **options: Any) -> Any:
        stream = super().astream(*args, **options)
        return _Interrupting(stream) if self.interrupt else stream


class _Interrupting:
    def __init__(self, stream: Any) -> None:
        self.cancel = stream.cancel

    async def __aiter__(self) -> AsyncIterator[Delta]:
        yield Delta("Your favorite")
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)


@pytest.fixture
def foreground() -> Iterator[None]:
    """Ctrl-C as in a foreground process: a shell tells what it starts with `&` to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("told", [[], [TELL]])
def test_ctrl_c_cancels_the_reply_and_leaves_the_thread(talk: Talk, told: list[str]) -> None:
    talk.engine = engine = Interrupted()
    talk(*told)
    before = messages(talk)
    engine.interrupt = True
    shown = talk(ASK, "/stats")
    assert "Your favorite" in shown
    assert "cancelled; the thread is as it was" in shown
    assert engine.cancelled == 1
    engine.interrupt = False
    assert messages(talk) == before
    assert (KNOWN if told else UNKNOWN) in talk(ASK)
    assert messages(talk)[:-2] == before


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_with_memory_off(talk: Talk) -> None:
    talk.engine = engine = Interrupted()
    talk(TELL)
    before = messages(talk)

    def lines() -> Any:
        yield "/memory off"
        engine.interrupt = True
        yield ASK
        engine.interrupt = False
        yield "Hello!"

    assert "cancelled" in talk.through(lines())
    assert len(engine.calls[-1]["messages"]) == len(before) + 1
    assert messages(talk) == before


def test_facts_are_cited_with_their_source(talk: Talk, tmp_path: Path) -> None:
    with FactStore(tmp_path / "facts", embeddings=DeterministicFakeEmbedding(size=8)) as store:
        store.add("The retry limit is 300.", source="runbook.md")
        store.add("The page size is 50.", source="api.md")
        talk.retriever = FactRetriever(store=store, k=2)
        shown = talk(TELL, "What is the page size?")
    assert re.search(r"The page size is 50\. \[(\d)\]", shown)
    assert re.search(r"\[\d\] The page size is 50\. \(api\.md\)", shown)
    assert "runbook.md" not in shown
    assert messages(talk)[0::2] == [TELL, "What is the page size?"]


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("2048", Window(tokens=2048)),
        ("2048t", Window(tokens=2048)),
        ("512 tokens", Window(tokens=512)),
        ("1m", Window(messages=1)),
        ("3 messages", Window(messages=3)),
    ],
)
def test_windows(text: str, window: Window) -> None:
    assert parse_window(text) == window


@pytest.mark.parametrize("text", ["", "many", "-3", "0", "4k", "1.5", "2 mm"])
def test_windows_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_window(text)
