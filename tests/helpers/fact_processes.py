"""What other processes do with a fact store (`tests.helpers.processes`), an embedder for it, and a Chroma server."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import chromadb  # noqa: F401 - so that processes that are forked off have it
import numpy as np
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings

from agentmem.errors import FactStoreError, StoreOwnedError
from agentmem_chroma import FactStore
from agentmem_chroma import store as store_module
from tests.helpers.processes import FORKSERVER, Say


class Hashed(Embeddings):
    """Vectors that depend on the text alone, made quickly."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [np.random.default_rng(list(text.encode())).normal(size=8).tolist() for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


def _open(place: str) -> FactStore:
    return FactStore(place, embeddings=DeterministicFakeEmbedding(size=16))


@contextmanager
def chroma_server(directory: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Chroma server over a directory: its address, and its process, which is killed at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chroma = Path(sys.executable).with_name("chroma")
    command = [str(chroma), "run", "--path", str(directory), "--host", "127.0.0.1", "--port", str(port)]
    # It says a line for each request: into a pipe that nobody empties it would soon have to wait.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            ends = time.monotonic() + 60
            while not _answers(port):
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < ends, f"nothing listens at {port}"
                time.sleep(0.02)
            yield f"http://127.0.0.1:{port}", server
        finally:
            server.kill()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def write(say: Say, directory: str) -> None:
    """Add facts for ever; says how many there are, at the beginning and whenever some were added."""
    with FactStore(directory, embeddings=Hashed(), rebuild=True) as store:
        count = store.count()
        while True:
            say(count)
            store.add([f"fact {n}" for n in range(count, count + 250)])
            count += 250


def die_while_deleting(say: Say, directory: str, text: str) -> None:
    """Delete a fact, and be killed when Chroma has done its part."""
    store = FactStore(directory, embeddings=Hashed())
    added = store.add(["another", text])
    store_module.overwrite_deleted = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    store.delete(added[1])


def own(say: Say, directory: str) -> None:
    """Hold a directory until somebody kills the process."""
    store = _open(directory)
    store.add(["the port is 8080", "tests run with make"], source="other process")
    say("ready")
    time.sleep(600)


def try_to_open(say: Say, directory: str) -> None:
    """Add a fact where the directory is free; says its id, or why it was refused."""
    try:
        with _open(directory) as store:
            say("opened", *store.add("from the second", source="s", thread="t"))
    except StoreOwnedError as error:
        say("refused", str(error))


def fork(say: Say, directory: str) -> None:
    """Fork with a store open; says what the child meets, and then how many facts there are."""
    store = _open(directory)
    store.add("a fact")
    child = os.fork()
    if child == 0:
        for call in (store.count, lambda: _open(directory)):
            try:
                call()
                say("worked")
            except FactStoreError as error:
                say("spawn" in str(error))
        os._exit(0)
    os.waitpid(child, 0)
    say(store.count())


def ask_a_server(say: Say, url: str) -> None:
    """Add and look, in two stores one after the other."""
    for name in ("first", "second"):
        with _open(url) as store:
            say(*store.add(["shared", name]))
            say(store.count(), store.search("shared", 1)[0].fact.text, store.delete("nope"))


def lose_a_server(say: Say, url: str, gone: str) -> None:
    """Say what a call raises as soon as there is a file `gone`."""
    with _open(url) as store:
        say("ready")
        while not os.path.exists(gone):
            time.sleep(0.001)
        try:
            store.count()
        except FactStoreError as error:
            say(str(error))


def _program(arguments: list[str], folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY), number)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def run_forked(command: list[str], *, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a program in Python, forked off from a process that has imported chromadb."""
    program = next(place for place, word in enumerate(command) if word.endswith(".py"))
    with TemporaryDirectory() as folder:
        process = FORKSERVER.Process(target=_program, args=(command[program:], folder))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        out, err = (Path(folder, name).read_text(errors="replace") for name in ("out", "err"))
    assert process.exitcode is not None
    return subprocess.CompletedProcess(command, process.exitcode, out, err)
