"""Whose threads are whose, their end with a receipt, and how much is let in."""

from __future__ import annotations

import asyncio
import json
import logging.config
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import openai
import pytest
from openai import OpenAI
from starlette.applications import Starlette
from typer.testing import CliRunner

from agentmem import Engine
from agentmem.errors import ConfigError, StorageError
from agentmem_cli.app import app as command
from agentmem_governance import Governor, Receipt
from agentmem_serve import KeyFile, create_app, run
from agentmem_serve.limits import Limits
from agentmem_sql import SQLAlchemySaver
from tests.serve.conftest import Serve, listening, plain, say, text_of


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.jsonl")


@pytest.fixture
def users(serve: Serve, keys: KeyFile) -> dict[str, OpenAI]:
    """Clients of two subjects of one server."""
    ada = serve(key=keys.add("ada"), keys=keys)
    return {"ada": ada, "ben": ada.copy(api_key=keys.add("ben"))}


def held(client: OpenAI, thread: str) -> list[str]:
    """What was asked in a session."""
    messages = plain(client, f"/v1/sessions/{quote(thread, safe='')}").json()["messages"]
    return [message["content"] for message in messages[::2]]


def test_a_key_sees_its_subjects_threads_and_no_other(users: dict[str, OpenAI]) -> None:
    ada, ben = users["ada"], users["ben"]
    say(ada, "My editor is helix.", "1")
    first = ada.responses.create(model="nano", input="My editor is helix.")
    for thread in ("1", "ada/1", "../ada/1"):
        assert "helix" not in text_of(say(ben, "What is my editor?", thread))
        assert held(ben, thread) == ["What is my editor?"]
    with pytest.raises(openai.NotFoundError):
        ben.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        ben.responses.create(model="nano", input="What is my editor?", previous_response_id=first.id)
    listed = [session["id"] for session in plain(ada, "/v1/sessions").json()["data"]]
    assert listed[0] == "1"
    assert len(listed) == 2
    assert plain(ben, f"/v1/sessions/{listed[1]}", "DELETE").status_code == 404
    assert "helix" in text_of(say(ada, "What is my editor?", "1"))


def test_without_a_key_only_health_is_told(users: dict[str, OpenAI], keys: KeyFile) -> None:
    revoked = keys.listed()[1]
    keys.revoke(revoked.id)
    for client in (users["ada"].copy(api_key="am-wrong"), users["ben"]):
        with pytest.raises(openai.AuthenticationError) as caught:
            say(client, "Hello!")
        assert caught.value.code == "invalid_api_key"
        assert plain(client, "/v1/sessions").status_code == 401
        assert plain(client, "/healthz").status_code == plain(client, "/metrics").status_code == 200
    assert say(users["ada"], "Hello!")


def test_the_file_of_keys_holds_none(keys: KeyFile, tmp_path: Path) -> None:
    path, run = str(tmp_path / "keys.jsonl"), CliRunner().invoke
    key = run(command, ["keys", "add", path, "--subject", "ada"]).output.strip()
    assert key.split("-", 2)[2] not in Path(path).read_text()
    assert Path(path).stat().st_mode & 0o777 == 0o600
    found = keys.find(key)
    assert found is not None
    assert found.subject == "ada"
    assert found.id in run(command, ["keys", "list", path]).output
    assert "ada" in run(command, ["keys", "revoke", path, found.id]).output
    assert keys.find(key) is None
    for wrong in ("", "ada/1"):
        with pytest.raises(ConfigError):
            keys.add(wrong)
    with pytest.raises(ConfigError):
        keys.revoke("none")
    Path(path).write_text("something else\n")
    with pytest.raises(ConfigError):
        KeyFile(path)
    result = run(command, ["serve", "--host", "0.0.0.0"])
    assert isinstance(result.exception, ConfigError)


def test_sessions_are_listed_inspected_and_deleted_with_a_receipt(users: dict[str, OpenAI], url: str) -> None:
    ada = users["ada"]
    for thread in ("a", "b/c", "d"):
        say(ada, "My editor is helix.", thread)
    page = plain(ada, "/v1/sessions?limit=2").json()
    assert ([session["id"] for session in page["data"]], page["has_more"]) == (["a", "b/c"], True)
    rest = plain(ada, "/v1/sessions?after=b/c").json()
    assert ([session["id"] for session in rest["data"]], rest["has_more"]) == (["d"], False)
    say(ada, "What is my editor?", "b/c")
    session = plain(ada, "/v1/sessions/b/c").json()
    assert [message["role"] for message in session["messages"]] == ["user", "assistant"] * 2
    assert (session["memory"]["consumed"], len(session["checkpoints"])) == (4, 2)
    earlier = session["checkpoints"][1]["response_id"]
    gone_back = ada.responses.create(model="nano", input="What is my editor?", previous_response_id=earlier)
    assert "helix" in gone_back.output_text

    receipt = plain(ada, "/v1/sessions/b/c", "DELETE").json()
    assert (receipt["operation"], receipt["subject"], receipt["threads"][0]["checkpoints"]) == (
        "forget thread",
        "ada",
        3,
    )
    with SQLAlchemySaver.from_url(url) as saver:
        assert Governor(saver).verify(Receipt.from_json(json.dumps(receipt))).holds
    assert plain(ada, "/v1/sessions/b/c").status_code == plain(ada, "/v1/sessions/b/c", "DELETE").status_code == 404
    assert "helix" not in text_of(say(ada, "What is my editor?", "b/c"))
    everything = plain(ada, "/v1/sessions", "DELETE").json()
    assert (everything["operation"], len(everything["threads"])) == ("forget subject", 3)
    assert plain(ada, "/v1/sessions").json()["data"] == []
    assert plain(ada, "/v1/sessions?limit=0").status_code == 400


class Slow:
    """An engine whose streams wait until they may go on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.go_on = threading.Event()
        self.begun = threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def aturn(self, *arguments: Any, **options: Any) -> Any:
        self.begun.release()
        while not self.go_on.is_set():  # not in a thread, which the end of the loop would wait for
            await asyncio.sleep(0.005)
        return await self._engine.aturn(*arguments, **options)


def test_what_is_too_much_is_told_when_to_come_again(serve: Serve, engine: Engine) -> None:
    slow = Slow(engine)
    client = serve(serving=slow, max_turns=2, max_body=2000)
    with pytest.raises(openai.APIStatusError) as large:
        say(client, "Hello! " * 1000)
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(say, client, "Hello!", thread) for thread in "ab"]
        for _ in running:
            slow.begun.acquire()
        with pytest.raises(openai.RateLimitError) as caught:
            say(client, "Hello!")
        assert (caught.value.code, caught.value.response.headers["Retry-After"]) == ("overloaded", "1")
        assert "agentmem_turns 2.0" in plain(client, "/metrics").text
        assert plain(client, "/v1/sessions").status_code == 200
        slow.go_on.set()
        assert all(text_of(call.result()) for call in running)
    assert say(client, "Hello!")


def test_a_server_that_may_not_wait_cancels_its_turns_and_stores_nothing(engine: Engine, url: str) -> None:
    slow = Slow(engine)
    with SQLAlchemySaver.from_url(url) as saver, ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        with listening(create_app(slow, saver), grace=0) as address:  # type: ignore[arg-type]
            client = stack.enter_context(OpenAI(api_key="none", base_url=f"{address}/v1", max_retries=0))
            running = pool.submit(say, client, "My editor is helix.", "t")
            slow.begun.acquire()
        assert isinstance(running.exception(), openai.APIError)
        assert saver.get_tuple({"configurable": {"thread_id": "t"}}) is None


def test_a_subject_has_so_many_requests_a_minute(users: dict[str, OpenAI], serve: Serve, keys: KeyFile) -> None:
    client = serve(key=keys.add("cleo"), keys=keys, requests_per_minute=2)
    answers = [plain(client, "/v1/models") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 30
    assert plain(client.copy(api_key=keys.add("dora")), "/v1/models").status_code == 200


def test_requests_come_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("agentmem_serve.limits.time.monotonic", lambda: now)
    limits = Limits(turns=1, per_minute=60, body=1)
    for _ in range(60):
        limits.request("ada")
    with pytest.raises(Exception, match="60 requests a minute"):
        limits.request("ada")
    now = 101.0
    limits.request("ada")


def test_no_control_sequence_reaches_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("uvicorn.run", lambda _, **options: given.update(options))
    run(Starlette(), host="127.0.0.1", port=0, grace=1)
    logging.config.dictConfig(given["log_config"])
    for name in ("agentmem_serve", "uvicorn.error"):
        try:
            raise StorageError("the thread 'a\x1b]52;c;aGk=\x07' cannot be read")
        except StorageError:
            logging.getLogger(name).exception("request \x9b2J")
    for name in ("agentmem_serve", "uvicorn"):
        logging.getLogger(name).handlers.clear()  # they write to this test's capture
    said = capsys.readouterr().err
    assert said.count("StorageError: the thread 'a\\x1b]52;c;aGk=\\x07'") == said.count("request \\x9b2J") == 2
    assert not set(said) & set("\x1b\x07\x9b")
