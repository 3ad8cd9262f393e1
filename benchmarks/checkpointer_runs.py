"""What ``checkpointers.py`` measures: savers on databases of their own, chat threads on them, and the clock.

    python benchmarks/checkpointer_runs.py SAVER DATABASE URL    the first get of a new process, as a line of JSON

Everything that a figure depends on is here; how figures are judged and shown is in ``checkpointers.py``. All times are
seconds, all sizes bytes.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Annotated, Any, ClassVar, TypedDict, TypeVar

from checkpointer_savers import ALONE, Contender, Servers, opened, saver_class, size
from langchain_core.messages import AIMessage, AnyMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from sqlalchemy import URL, make_url

CALLS = ("put", "put_writes", "get_tuple")
QUESTION, ANSWER, MEMORY = 200, 400, 9216
# LangGraph stores one for the question, one before the node runs and one after it.
CHECKPOINTS = 3
THREAD = "a conversation"
TURN, NEW_PROCESS, WITH_OPENING = "whole turn", "get_tuple, new process", "opening and get_tuple, new process"
RAW, GRAPH = "put and put_writes alone", "graph turns"
# Bytes a turn are a mean over so many turns up to one of these: pages that are not yet full make single turns uneven.
GROWTH_WINDOW, GROWTH_AT = 50, (100, 500, 1000)
T = TypeVar("T")
Calls = list[tuple[str, tuple[Any, ...]]]
Rate = tuple[Contender, str, float]


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    memory: dict[str, Any]


def words(source: random.Random, count: int) -> str:
    return "".join(source.choices("abcdefghijklmnopqrstuvwxyz      ", k=count))


def chat_graph(saver: Any) -> Any:
    """One node, which answers with 400 characters and leaves 9,216 bytes that no turn has left before."""

    def node(state: State) -> dict[str, Any]:
        source = random.Random(f"{state['messages'][-1].content} {len(state['messages'])}")
        memory = {"v": 1, "shape": [36, 1, 8, 8], "data": source.randbytes(MEMORY)}
        return {"messages": [AIMessage(words(source, ANSWER))], "memory": memory}

    builder = StateGraph(State).add_node("node", node).add_edge(START, "node").add_edge("node", END)
    return builder.compile(checkpointer=saver)


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


def take_turn(graph: Any, thread: str, number: int, seed: object) -> None:
    """One turn; question, answer and state follow from the seed and the number alone."""
    question = words(random.Random(f"{seed} {number}"), QUESTION)
    graph.invoke({"messages": [("user", question)]}, config(thread), durability="sync")


def check(saver: Any, thread: str, turns: int) -> None:
    """A saver that keeps less than it was given is not fast but wrong.

    Raises:
        RuntimeError: the thread's newest checkpoint does not hold what so many turns leave.
    """
    found = saver.get_tuple(config(thread))
    values = found.checkpoint["channel_values"] if found else {}
    lengths = {len(message.content) for message in values.get("messages", ())}
    kept = len(values.get("messages", ())), lengths, len(values.get("memory", {}).get("data", b""))
    if kept != (2 * turns, {QUESTION, ANSWER}, MEMORY):
        raise RuntimeError(f"{type(saver).__name__} gave back {kept} after {turns} turns")


class Watch:
    """Takes the time of a saver's calls, from whichever thread they come."""

    def __init__(self, saver: Any) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in CALLS}
        for name in CALLS:
            setattr(saver, name, self._timed(getattr(saver, name), self.seconds[name]))

    def clear(self) -> None:
        for taken in self.seconds.values():
            taken.clear()

    @staticmethod
    def _timed(call: Callable[..., Any], taken: list[float]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            taken.append(time.perf_counter() - start)
            return result

        return timed


# One conversation on each saver, side by side.


@dataclass
class Found:
    """What was measured.

    ``seconds``: (contender, mark, call) -> (repetition, turn) -> seconds, so that contenders can be compared turn by
    turn. ``sizes``: contender -> turns -> bytes. ``rates``: (contender, load) -> checkpoints a second, by round.
    """

    seconds: dict[tuple[Contender, int, str], dict[tuple[int, int], float]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    sizes: dict[Contender, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    rates: dict[tuple[Contender, str], list[float]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Plan:
    """How long the conversations are and where they are measured.

    ``marks``: turns around which time is taken and after which size is. ``shown``: those of them at which new processes
    are started too, ``children`` for each contender; every repetition reaches the last of them, only the first goes on.
    ``window``: turns on either side of a mark that count for it.
    """

    marks: tuple[int, ...]
    shown: tuple[int, ...]
    window: int
    children: int

    def near(self, turn: int) -> int | None:
        """The mark that a turn's time counts for."""
        return next((mark for mark in self.marks if abs(turn - mark) <= self.window), None)

    def last(self, repeat: int) -> int:
        """The last turn of a repetition."""
        return max(self.marks if repeat == 0 else self.shown) + self.window


class Conversation:
    """A contender's thread, in a process of its own, as it is in service.

    In one process with the others a saver's time is that of fetching its messages from memory anew: what the others
    keep of their thousands of messages pushes them out of the processor's caches between two turns.
    """

    def __init__(self, contender: Contender, url: URL) -> None:
        self.contender, self.url = contender, url
        spawned = get_context("spawn")
        self._process = ProcessPoolExecutor(1, spawned, Talk.begin, (contender, url))

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown(cancel_futures=True)

    def turn(self, number: int, seed: int) -> dict[str, float]:
        """Take a turn; the mean time of each kind of call in it, and the time of the whole."""
        return self._process.submit(Talk.turn, number, seed).result()

    def end(self, turns: int) -> None:
        """Check that the thread has so many turns, and close the saver.

        Raises:
            RuntimeError: it has not.
        """
        self._process.submit(Talk.end, turns).result()


class Talk:
    """What the process of a ``Conversation`` holds."""

    here: ClassVar[Talk]

    def __init__(self, contender: Contender, url: URL) -> None:
        self._stack = ExitStack()
        self._saver = self._stack.enter_context(opened(contender, url))
        self._watch = Watch(self._saver)
        self._graph = chat_graph(self._saver)

    @classmethod
    def begin(cls, contender: Contender, url: URL) -> None:
        """Open the saver."""
        cls.here = cls(contender, url)

    @classmethod
    def turn(cls, number: int, seed: int) -> dict[str, float]:
        """As ``Conversation.turn``."""
        watch = cls.here._watch
        watch.clear()
        start = time.perf_counter()
        take_turn(cls.here._graph, THREAD, number, seed)
        whole = time.perf_counter() - start
        return {name: statistics.mean(taken) for name, taken in watch.seconds.items()} | {TURN: whole}

    @classmethod
    def end(cls, turns: int) -> None:
        """As ``Conversation.end``."""
        with cls.here._stack:
            check(cls.here._saver, THREAD, turns)


def converse(contenders: Sequence[Contender], servers: Servers, plan: Plan, repeat: int, found: Found) -> Iterator[str]:
    """One repetition: every contender takes turn 1, then every one turn 2 ..., in a new order each time.

    Sizes and new processes are measured in the first repetition. Tells how far it is, now and then.
    """
    first, last = repeat == 0, plan.last(repeat)
    with ExitStack() as stack:
        talks = []
        for contender in contenders:
            url = stack.enter_context(servers.database(contender.database))
            talks.append(stack.enter_context(Conversation(contender, url)))
        for number in range(1, last + 1):
            for talk in shuffled(talks, number):
                taken = talk.turn(number, repeat)
                if mark := plan.near(number):
                    for call, seconds in taken.items():
                        found.seconds[talk.contender, mark, call][repeat, number] = seconds
            if first and (number in plan.marks or number + GROWTH_WINDOW in GROWTH_AT):
                yield f"turn {number:,} of {last:,}"
                for talk in talks:
                    found.sizes[talk.contender][number] = size(talk.url)
            if first and number in plan.shown:
                for again in range(plan.children):
                    for talk in shuffled(talks, again):
                        for call, seconds in first_get(talk).items():
                            found.seconds[talk.contender, number, call][again, number] = seconds
        for talk in talks:
            talk.end(last)


def shuffled(items: Sequence[T], number: int) -> list[T]:
    """Another order for every number, so that no contender always comes after the same other."""
    return random.Random(number).sample(items, len(items))


def first_get(talk: Conversation) -> dict[str, float]:
    """Open the saver in a new process and get the thread's newest checkpoint."""
    url = talk.url.render_as_string(hide_password=False)
    command = [sys.executable, __file__, talk.contender.saver, talk.contender.database, url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{talk.contender}: the first get of a new process failed: {done.stderr}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def child(saver: str, database: str, address: str) -> None:
    """Import everything first, so that the time is the saver's own; print seconds."""
    url = make_url(address)
    url.get_dialect().import_dbapi()
    contender = next(c for c in ALONE if (c.saver, c.database) == (saver, database))
    saver_class(contender)
    # Imports leave a collection of garbage due, at a chance moment; it would take several times what is measured.
    gc.collect()
    begin = time.perf_counter()
    with opened(contender, url) as opened_saver:
        ready = time.perf_counter()
        opened_saver.get_tuple(config(THREAD))
        end = time.perf_counter()
    print(json.dumps({NEW_PROCESS: end - ready, WITH_OPENING: end - begin}))


# Many threads at once.


class Recorder(InMemorySaver):
    """Keeps the calls that a graph makes, to make them again on another saver."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = []

    def put(self, *args: Any) -> Any:
        self.calls.append(("put", args))
        return super().put(*args)

    def put_writes(self, *args: Any) -> None:
        self.calls.append(("put_writes", args))
        super().put_writes(*args)


def recorded(thread: str, turns: int) -> Calls:
    """The put and put_writes calls of a thread's turns, with messages that no other call has seen."""
    recorder = Recorder()
    graph = chat_graph(recorder)
    for number in range(1, turns + 1):
        take_turn(graph, thread, number, thread)
    return recorder.calls


def together(jobs: Sequence[Callable[[], None]]) -> float:
    """Run every job at once, in a thread of its own; seconds until the last is done."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        begin = time.perf_counter()
        for running in [threads.submit(job) for job in jobs]:
            running.result()
        return time.perf_counter() - begin


def race(contender: Contender, servers: Servers, workers: int, turns: int, load: str) -> float:
    """Checkpoints a second that ``workers`` threads store on one saver, a conversation each."""
    names = [f"thread {number}" for number in range(workers)]
    with servers.database(contender.database) as url, opened(contender, url, workers) as saver:
        graph = chat_graph(saver)

        def talk(name: str) -> None:
            for number in range(1, turns + 1):
                take_turn(graph, name, number, name)

        def repeat(calls: Calls) -> None:
            for method, args in calls:
                getattr(saver, method)(*args)

        # Connections are opened and statements prepared before the clock runs.
        together([partial(repeat, recorded(f"first {name}", 1)) for name in names])
        if load == GRAPH:
            seconds = together([partial(talk, name) for name in names])
        else:
            seconds = together([partial(repeat, recorded(name, turns)) for name in names])
        for name in names:
            check(saver, name, turns)
    return CHECKPOINTS * turns * workers / seconds


def compete(contenders: Sequence[Contender], servers: Servers, workers: int, turns: int, number: int) -> Iterator[Rate]:
    """One round: every contender with both kinds of load, each on a fresh database."""
    for load in (RAW, GRAPH):
        for contender in shuffled(contenders, number):
            yield contender, load, race(contender, servers, workers, turns, load)


if __name__ == "__main__":
    child(*sys.argv[1:])
