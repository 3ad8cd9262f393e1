"""Engines that chat models load: shared, loaded beside each other, and never taken along by a fork."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

import agentmem
from agentmem_langgraph import ChatDeltaMem
from tests.helpers.fake_engine import FakeEngine


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`agentmem.load` gives stand-ins; the loads by model, and events that hold a load up."""
    seen: dict[str, Any] = {"models": [], "hold": {}, "begun": threading.Event()}

    def load(model: str, **_: Any) -> FakeEngine:
        seen["models"].append(model)
        seen["begun"].set()
        if model in seen["hold"]:
            assert seen["hold"][model].wait(10)
        return FakeEngine()

    monkeypatch.setattr(agentmem, "load", load)
    return seen


def test_a_model_that_loads_holds_up_no_other(loads: dict[str, Any]) -> None:
    release = loads["hold"]["slow"] = threading.Event()
    slow, fast = ChatDeltaMem(model="slow"), ChatDeltaMem(model="fast")
    thread = threading.Thread(target=slow.invoke, args=("hello",))
    thread.start()
    assert loads["begun"].wait(10)
    fast.invoke("hello")
    fast.close()
    assert thread.is_alive()
    release.set()
    thread.join(10)
    slow.close()
    assert loads["models"] == ["slow", "fast"]


def test_two_calls_at_once_load_one_engine(loads: dict[str, Any]) -> None:
    release = loads["hold"]["m"] = threading.Event()
    models = [ChatDeltaMem(model="m") for _ in range(3)]
    threads = [threading.Thread(target=model.invoke, args=("hello",)) for model in models]
    for thread in threads:
        thread.start()
    release.set()
    for thread in threads:
        thread.join(10)
    assert loads["models"] == ["m"]
    for model in models:
        model.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_model_that_a_forked_process_makes_loads_an_engine_of_its_own(loads: dict[str, Any]) -> None:
    model = ChatDeltaMem(model="m")
    model.invoke("hello")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        ChatDeltaMem(model="m").invoke("hello")
        os.write(write, bytes([len(loads["models"])]))
        os._exit(0)
    os.close(write)
    assert os.read(read, 1) == bytes([2])
    os.close(read)
    os.waitpid(child, 0)
    model.close()
