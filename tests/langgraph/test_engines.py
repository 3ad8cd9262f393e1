"""Engines that chat models load: shared, loaded beside each other, and never taken along by a fork."""

from __future__ import annotations

import copy
import inspect
import os
import pickle  # noqa: TID251 - other people's code pickles models
import threading
from typing import Any

import pytest
from langchain_core.runnables import ConfigurableField

import agentmem
from agentmem.errors import ConfigError
from agentmem_langgraph import ChatDeltaMem
from tests.helpers.fake_engine import FakeEngine


class Loaded:
    """What `agentmem.load` was asked for, the stand-ins that it gave, the closed ones, and what holds a load up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: list[dict[str, Any]] = []
        self.engines: list[FakeEngine] = []
        self.closed: list[FakeEngine] = []
        self.hold: dict[str, threading.Event] = {}
        self.begun = threading.Event()
        monkeypatch.setattr(agentmem, "load", self._load)
        monkeypatch.setattr(FakeEngine, "close", lambda engine: self.closed.append(engine))

    def _load(self, **options: Any) -> FakeEngine:
        self.options.append(options)
        self.begun.set()
        if options["model"] in self.hold:
            assert self.hold[options["model"]].wait(10)
        self.engines.append(FakeEngine())
        return self.engines[-1]

    _load.__signature__ = inspect.signature(agentmem.load)  # type: ignore[attr-defined]

    @property
    def models(self) -> list[str]:
        return [options["model"] for options in self.options]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    return Loaded(monkeypatch)


def test_a_model_that_loads_holds_up_no_other(loaded: Loaded) -> None:
    release = loaded.hold["slow"] = threading.Event()
    slow, fast = ChatDeltaMem(model="slow"), ChatDeltaMem(model="fast")
    thread = threading.Thread(target=slow.invoke, args=("hello",))
    thread.start()
    assert loaded.begun.wait(10)
    fast.invoke("hello")
    fast.close()
    assert thread.is_alive()
    release.set()
    thread.join(10)
    slow.close()
    assert loaded.models == ["slow", "fast"]


def test_two_calls_at_once_load_one_engine(loaded: Loaded) -> None:
    release = loaded.hold["m"] = threading.Event()
    models = [ChatDeltaMem(model="m") for _ in range(3)]
    threads = [threading.Thread(target=model.invoke, args=("hello",)) for model in models]
    for thread in threads:
        thread.start()
    release.set()
    for thread in threads:
        thread.join(10)
    assert loaded.models == ["m"]
    for model in models:
        model.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_model_that_a_forked_process_makes_loads_an_engine_of_its_own(loaded: Loaded) -> None:
    model = ChatDeltaMem(model="m")
    model.invoke("hello")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        ChatDeltaMem(model="m").invoke("hello")
        os.write(write, bytes([len(loaded.models)]))
        os._exit(0)
    os.close(write)
    assert os.read(read, 1) == bytes([2])
    os.close(read)
    os.waitpid(child, 0)
    model.close()


def test_the_engine_is_loaded_on_first_use(loaded: Loaded) -> None:
    options = {"quantize": "4bit", "revision": "v1"}
    llm = ChatDeltaMem(model="some/model", adapter="some/adapter", load_options=options)
    assert not loaded.options
    assert llm.asdict()["model_name"] == "some/model"
    llm.batch(["Hello!", "Hello!"])
    assert loaded.options == [{"model": "some/model", "adapter": "some/adapter", **options}]


@pytest.mark.parametrize("name", ["devise", "model", "adapter"])
def test_options_that_loading_does_not_take_are_named(loaded: Loaded, name: str) -> None:
    with pytest.raises(ConfigError, match=f"load_options takes device.*found {name}"):
        ChatDeltaMem(model="some/model", load_options={name: "cpu"}).invoke("Hello!")
    assert not loaded.options


@pytest.mark.parametrize("way", ["a config", "a copy", "a pickled copy"])
def test_code_of_one_model_is_trusted_and_no_other_that_a_call_names(loaded: Loaded, way: str) -> None:
    llm = ChatDeltaMem(model="some/model", load_options={"trust_remote_code": True})
    named: Any
    if way == "a config":
        named = llm.configurable_fields(model=ConfigurableField(id="model")).with_config(
            configurable={"model": "other/model"}
        )
    else:
        named = pickle.loads(pickle.dumps(llm)) if "pickled" in way else llm  # noqa: S301 - made here
        named = named.model_copy(update={"model": "other/model"})
    with pytest.raises(ConfigError, match="given for the model 'some/model', not for 'other/model'"):
        named.invoke("Hello!")
    llm.invoke("Hello!")
    ChatDeltaMem(model="other/model", load_options={"trust_remote_code": True}).invoke("Hello!")
    assert loaded.models == ["some/model", "other/model"]


def test_copies_share_what_is_loaded(loaded: Loaded) -> None:
    """LangChain makes a new object of a configurable model for every call."""
    llm = ChatDeltaMem(model="copied/model", max_tokens=3)
    configurable = llm.configurable_fields(max_tokens=ConfigurableField(id="limit"))
    for limit in (2, 3, 4):
        assert len(configurable.with_config(configurable={"limit": limit}).invoke("Hello!").text.split()) == limit
    assert len(loaded.engines) == 1
    bare = llm.model_copy(update={"adapter": False, "load_options": {"dtype": "float32"}})
    bare.invoke("Hello!")
    assert loaded.options[1:] == [{"model": "copied/model", "adapter": False, "dtype": "float32"}]
    llm.close()
    llm.invoke("Hello!")
    assert len(loaded.engines) == 3
    for twin in (copy.copy(llm), copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))):  # noqa: S301 - made here
        assert twin.max_tokens == 3
        assert len(twin.invoke("Hello!").text.split()) == 3
    assert len(loaded.engines) == 3


def test_models_of_one_source_share_an_engine_until_the_last_one_closes(loaded: Loaded) -> None:
    first, second = ChatDeltaMem(model="shared/model"), ChatDeltaMem(model="shared/model", temperature=1.0)
    other = ChatDeltaMem(model="shared/model", load_options={"dtype": "float32"})
    for llm in (first, second, other):
        llm.invoke("Hello!")
    assert len(loaded.engines) == 2
    first.close()
    assert not loaded.closed
    second.invoke("Hello!")
    second.close()
    assert loaded.closed == loaded.engines[:1]
    other.close()
    assert loaded.closed == loaded.engines
