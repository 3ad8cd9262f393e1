"""`agentmem serve` as processes on one PostgreSQL database: one is killed, one is asked to end."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import openai
import pytest
from openai import OpenAI

from agentmem_serve.threads import Threads
from agentmem_sql import SQLAlchemySaver
from tests.serve.conftest import say, text_of

_WORKERS, _TURNS = 3, 8


@contextmanager
def process(url: str) -> Iterator[tuple[subprocess.Popen[str], OpenAI]]:
    """A replica, and a client for it."""
    command = [sys.executable, "-c", "from agentmem_cli import main; main()", "serve", "--db", url, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            said: list[str] = []
            for line in running.stderr:
                said.append(line)
                if found := re.search(r"running on (http://[\d.:]+)", line):
                    break
            else:
                pytest.fail("".join(said))
            with OpenAI(api_key="none", base_url=f"{found[1]}/v1", max_retries=0, timeout=600) as client:
                yield running, client
        finally:
            running.kill()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # two models are loaded
def test_a_replica_that_is_killed_loses_no_acknowledged_turn_and_one_that_ends_finishes(postgresql_url: str) -> None:
    acknowledged: dict[str, str] = {}
    numbers, enough = itertools.count(), threading.Event()

    def talk(clients: list[OpenAI]) -> None:
        for client in itertools.cycle(clients):
            if enough.is_set():
                return
            text = f"Hello number {next(numbers)}."
            with suppress(openai.APIConnectionError):  # of the one that was killed
                acknowledged[text] = text_of(say(client, text, "t"))
                if len(acknowledged) == _TURNS:
                    running.kill()
                if len(acknowledged) == 2 * _TURNS:
                    enough.set()

    with process(postgresql_url) as (running, first), process(postgresql_url) as (other, second):
        with ThreadPoolExecutor(_WORKERS) as pool:
            talking = [pool.submit(talk, [first, second]) for _ in range(_WORKERS)]
            wait(talking, return_when=FIRST_EXCEPTION)
            enough.set()
            for done in talking:
                done.result()
        stream = say(second, "My editor is helix.", "t", stream=True)
        chunks = [next(iter(stream))]
        other.send_signal(signal.SIGTERM)
        chunks += list(stream)
        acknowledged["My editor is helix."] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert other.wait(30) in (0, -signal.SIGTERM)

    with SQLAlchemySaver.from_url(postgresql_url) as saver:
        messages = [str(message.content) for message in asyncio.run(Threads(saver).read("t")).messages]
    stored = dict(zip(messages[::2], messages[1::2], strict=True))
    assert acknowledged.items() <= stored.items()
    # What was stored and not acknowledged was under way when the first was killed.
    assert len(stored) - len(acknowledged) <= _WORKERS
