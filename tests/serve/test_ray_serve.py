"""`examples/ray_serve` on a Ray of this machine: two replicas on one PostgreSQL database, one of them killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from openai import OpenAI

from agentmem_serve.threads import Threads
from agentmem_sql import SQLAlchemySaver
from tests.serve.conftest import plain, say, text_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_WORKERS, _TURNS = 3, 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # Ray starts, and two models are loaded
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the dependency group ray"),
]


@contextmanager
def ray_serve(database: str, log: Path) -> Iterator[tuple[psutil.Process, OpenAI]]:
    """Two replicas; gives the process that all others come from, and a client."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray_serve", "--db", database, "--replicas", "2", "--port", str(port)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    with log.open("wb") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as running:
        try:
            while not _answers(f"http://127.0.0.1:{port}/readyz"):
                assert running.poll() is None, log.read_text()
                time.sleep(0.5)
            address = f"http://127.0.0.1:{port}/v1"
            with OpenAI(api_key="none", base_url=address, max_retries=0, timeout=900) as client:
                yield psutil.Process(running.pid), client
        finally:
            running.terminate()  # it ends what it has started
            running.wait(120)


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).is_success
    except httpx.TransportError:
        return False


def replicas(of: psutil.Process) -> list[psutil.Process]:
    """The processes that have an engine each."""
    return [child for child in of.children(recursive=True) if child.name().startswith("ray::ServeRepl")]


def test_threads_stay_at_a_replica_and_a_killed_one_loses_no_acknowledged_turn(
    tmp_path: Path, postgresql_url: str
) -> None:
    acknowledged: dict[str, dict[str, str]] = {f"t{number}": {} for number in range(_WORKERS)}
    failed = list[openai.APIError]()

    def told() -> int:
        return sum(map(len, acknowledged.values()))

    def talk(client: OpenAI, thread: str) -> None:
        for number in itertools.count():
            if told() >= 3 * _TURNS or len(failed) > _WORKERS:
                return
            text = f"Hello number {number}."
            try:
                acknowledged[thread][text] = text_of(say(client, text, thread))
            except openai.APIError as error:  # of the replica that was killed
                failed.append(error)

    with ray_serve(postgresql_url, tmp_path / "ray.log") as (parent, client):
        for number in range(4):
            say(client, f"Hello number {number}.", "alone")
        # Answered by the thread's replica, since the header names it.
        counted = plain(client, "/metrics", headers={"X-Thread-Id": "alone"}).text
        assert 'agentmem_requests_total{route="/v1/chat/completions",status="200"} 4.0' in counted
        with ThreadPoolExecutor(_WORKERS) as pool:
            talking = [pool.submit(talk, client, thread) for thread in acknowledged]
            while told() < _TURNS and not any(done.done() for done in talking):
                time.sleep(0.1)
            first, _ = replicas(parent)
            first.kill()
            wait(talking)
            for done in talking:
                done.result()
    assert len(failed) <= _WORKERS, failed  # each worker had at most one turn under way
    with SQLAlchemySaver.from_url(postgresql_url) as saver:
        for thread, said in acknowledged.items():
            messages = [str(message.content) for message in asyncio.run(Threads(saver).read(thread)).messages]
            assert said.items() <= dict(zip(messages[::2], messages[1::2], strict=True)).items()
