"""Measures a memory with its controls: questions about conversations that are no longer in the prompt.

Each conversation is written into a memory through the engine, turn by turn, and each question about it is asked apart,
from the state at the end of the conversation. The arms (`agentmem.training.contexts`) differ only in what the model may
know: the conversation's own memory, an empty or a foreign one, or none; and in the prompt nothing of the conversation,
some of its messages, or all of it.

A memory is useful as far as its share of right replies exceeds that of the better of zero and foreign
(`ArmResults.score`). Decoding is greedy. Replies are judged by their text (`agentmem.training.judging`).

Turns run side by side, so that the engine decodes them in one batch. What zero and bare reply depends on the question
alone, so each is asked once.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from agentmem.engine import Engine
from agentmem.errors import ConfigError
from agentmem.generation.plan import TurnOptions
from agentmem.generation.sampling import Sampling
from agentmem.messages import Message
from agentmem.prompt.transcript import Window
from agentmem.record import ConsumedRecord
from agentmem.state import MemoryState
from agentmem.training.contexts import (
    ARMS,
    COMPRESSED,
    CONTROLLED,
    NEAREST,
    RETRIEVING,
    SETUPS,
    STATIC,
    Arm,
    Compressor,
    Ranker,
    compressed,
    excerpts,
    import_bm25s,
)
from agentmem.training.conversations import Conversation
from agentmem.training.drafts import MOST_TOLD, stands
from agentmem.training.judging import MAX_WORDS, is_judged
from agentmem.training.memory_bank import SUMMARY_TOKENS, MemoryBank
from agentmem.training.predictions import (
    ArmQuestion,
    ArmReply,
    ArmResults,
    Prediction,
    PredictionLog,
    Probe,
    best_constants,
)

Writing = Literal["remember", "live"]

MAX_TOKENS = 24
"""Most tokens of a reply: answers are short, and a control that knows nothing may go on for ever."""

CONTEXT_TOKENS = 128
"""Most tokens that `window`, `retrieval` and the like show of a conversation beside the question."""

LEAST_CONTEXT = 16
"""Fewest tokens that `context_tokens` may be, so that the ones that open a reply always fit."""

_LAST_MESSAGE = Window(messages=1)
_KEY = 16  # hexadecimal digits of a prediction's key
T = TypeVar("T")
R = TypeVar("R")


def probes_of(conversations: Iterable[Conversation]) -> tuple[Probe, ...]:
    """A probe for every question whose reply can be judged by its text; conversations are numbered from 0."""
    return tuple(
        Probe(conversation.messages, ask, number)
        for number, conversation in enumerate(conversations)
        for ask in conversation.asks
        if is_judged(ask)
    )


def measure(
    engine: Engine,
    probes: Sequence[Probe],
    arms: Sequence[Arm] = CONTROLLED,
    *,
    writing: Writing = "remember",
    window: Window = _LAST_MESSAGE,
    context_tokens: int = CONTEXT_TOKENS,
    max_tokens: int = MAX_TOKENS,
    max_words: int | None = MAX_WORDS,
    concurrency: int = 32,
    predictions: Path | None = None,
    labels: Mapping[str, Any] | None = None,
    asker: Callable[[], Engine] | None = None,
    nearest: Ranker | None = None,
    compress: Compressor | None = None,
    static: tuple[str, Callable[[], Engine]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ArmResults:
    """Ask all probes of all arms.

    Args:
        engine: the model and its memory; without an adapter, only arms without memory can be measured. An engine takes
            the adapter's fingerprint when it is made, so make a new one after the adapter was trained on.
        probes: the questions; see `probes_of`.
        arms: who is asked.
        writing: how a conversation is written: "remember" = `Engine.remember`, one turn after another, with the
            replies as they are given; "live" = `Engine.turn` for each user message, the replies being the model's own.
        window: what a prompt shows, in "live" turns and in the questions of arms that show nothing else.
        context_tokens: most tokens of the conversation beside the question, for arms that show some of its messages.
        max_tokens: most tokens of a reply.
        max_words: most words of a right reply; None: any number.
        concurrency: how many turns run at once.
        predictions: a JSONL file that gets a line for each prediction. Those that are in it already are not asked
            again, so an interrupted measurement is continued.
        labels: added to each line of the file.
        asker: makes the engine that asks, where it is not the one that writes; states go to it as JSON, as through a
            file. It is not closed here.
        nearest: ranks passages for the arms that search by meaning.
        compress: for the arms that compress.
        static: for the arms with a static LoRA, its fingerprint, and what loads an engine with it; that is closed here.
        on_progress: is given the numbers of predictions made and of all predictions.

    Raises:
        ConfigError: there is no probe, an arm is unknown or cannot be asked these questions, no other conversation is
            there for `foreign`, or what an arm needs is missing; or conversations with tool results are to be
            written live.
        MissingAdapterError: an arm needs memory and the engine has none.
        MissingExtraError: an arm retrieves, and bm25s is not installed.
    """
    run = ArmMeasurement(
        engine,
        tuple(probes),
        writing,
        window,
        context_tokens,
        max_tokens,
        concurrency,
        nearest,
        compress,
        "" if static is None else static[0],
    )
    run.check(arms)
    constants = best_constants(run.probes, max_words) if "constant" in arms else {}
    if unanswered := {probe.ask.kind for probe in run.probes if "constant" in arms} - set(constants):
        raise ConfigError(
            f"the constant arm needs questions with accepted values; those of kind {min(unanswered)!r} have none"
        )
    log = PredictionLog(predictions, dict(labels or {}), engine, max_words)
    questions = [ArmQuestion(probe, arm, run.key(probe, arm, constants)) for arm in arms for probe in run.probes]
    for question in questions:
        if question.arm == "constant" and question.key not in log.replies:
            log.put(question, ArmReply(Message("assistant", constants[question.probe.ask.kind]), 0))
    pending = [question for question in questions if question.key not in log.replies]
    total, done = len(questions), len(questions) - len(pending)

    groups: dict[str, list[ArmQuestion]] = defaultdict(list)  # one reply for each group
    for question in pending:
        groups[run.prompt_key(question)].append(question)
    for question in questions:
        if question.key in log.replies and (same := groups.pop(run.prompt_key(question), None)):
            for other in same:
                log.put(other, log.replies[question.key])
            done += len(same)

    lock = threading.Lock()
    if on_progress is not None:
        on_progress(done, total)

    def ask(group: list[ArmQuestion]) -> None:
        nonlocal done
        reply = run.ask(engine_of[SETUPS[group[0].arm].static], group[0], states, banks)
        with lock:
            for question in group:
                log.put(question, reply)
            done += len(group)
            if on_progress is not None:
                on_progress(done, total)

    if groups:
        needed = {number for group in groups.values() for number in run.sources(group[0])}
        states = run.write(needed)
        asking = engine if asker is None else asker()
        if asker is not None:
            states = {n: MemoryState.from_dict(json.loads(json.dumps(s.to_json()))) for n, s in states.items()}
        asked = [group[0] for group in groups.values()]
        engine_of = {False: asking}
        banks = run.fill_banks(q.probe.conversation for q in asked if SETUPS[q.arm].shows == "bank")
        run.side_by_side(ask, [group for group in groups.values() if not SETUPS[group[0].arm].static])
        if static is not None and (rest := [group for group in groups.values() if SETUPS[group[0].arm].static]):
            with static[1]() as engine_of[True]:
                run.side_by_side(ask, rest)
    return ArmResults(tuple(Prediction.of(question, log.replies[question.key], max_words) for question in questions))


@dataclass
class ArmMeasurement:
    """What all predictions of a measurement share."""

    engine: Engine
    probes: tuple[Probe, ...]
    writing: Writing
    window: Window
    context_tokens: int
    max_tokens: int
    concurrency: int
    nearest: Ranker | None = None
    compress: Compressor | None = None
    static: str = ""
    told: dict[int, tuple[Message, ...]] = field(init=False)
    foreign: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.told = {probe.conversation: probe.told for probe in self.probes}
        self.foreign = partners(self.told)

    def check(self, arms: Sequence[Arm]) -> None:
        """Refuse what cannot be measured before anything is computed."""
        if not self.probes:
            raise ConfigError(
                "no question can be judged by its reply's text; give conversations with questions that have values"
            )
        if unknown := set(arms) - set(ARMS):
            raise ConfigError(f"arms are {', '.join(ARMS)}; found {', '.join(sorted(unknown))}")
        if "foreign" in arms and len(self.told) < 2:
            raise ConfigError("the foreign arm needs the memory of another conversation; give two or more")
        if self.context_tokens < LEAST_CONTEXT:
            raise ConfigError(f"context_tokens are at least {LEAST_CONTEXT}; found {self.context_tokens}")
        if self.writing not in get_args(Writing):
            raise ConfigError(f"writing is {' or '.join(get_args(Writing))}; found {self.writing!r}")
        if self.writing == "live":
            if any(message.role == "tool" for told in self.told.values() for message in told):
                raise ConfigError('conversations with tool results cannot be had anew; write them with "remember"')
            if "window_memory" in arms:  # its prompt shows what the memory has consumed
                raise ConfigError('window_memory shows the replies as they are given; write them with "remember"')
        if set(arms) & set(RETRIEVING):
            import_bm25s()
        if self.nearest is None and set(arms) & set(NEAREST):
            raise ConfigError(f"the arms {', '.join(NEAREST)} need a ranker of passages (nearest); leave them out here")
        if self.compress is None and set(arms) & set(COMPRESSED):
            raise ConfigError(f"the arms {', '.join(COMPRESSED)} need a compressor (compress); leave them out here")
        if not self.static and set(arms) & set(STATIC):
            raise ConfigError(f"the arms {', '.join(STATIC)} need a static LoRA (static); leave them out here")
        if any(SETUPS[arm].memory is not None for arm in arms):
            self.engine.zero_state()  # raises where there is no memory

    def sources(self, question: ArmQuestion) -> list[int]:
        """The conversation whose memory a question is asked with; none for the arms that have none."""
        number = question.probe.conversation
        memory = SETUPS[question.arm].memory
        return {"own": [number], "foreign": [self.foreign.get(number, number)]}.get(memory or "", [])

    def write(self, numbers: Iterable[int]) -> dict[int, MemoryState]:
        """The states that the conversations end with."""
        ordered = sorted(numbers)
        return dict(zip(ordered, self.side_by_side(lambda n: self._write(self.told[n]), ordered), strict=True))

    def fill_banks(self, numbers: Iterable[int]) -> dict[int, MemoryBank]:
        """The stores of conversations, by their numbers; the engine's model writes the summaries."""
        options: TurnOptions = {"memory": False, "sampling": Sampling(max_tokens=SUMMARY_TOKENS)}
        ordered = sorted(set(numbers))

        def summarise(prompt: Message) -> str:
            return self.engine.turn([prompt], None, **options).message.content

        banks = self.side_by_side(lambda number: MemoryBank.fill(self.told[number], summarise), ordered)
        return dict(zip(ordered, banks, strict=True))

    def _write(self, told: Sequence[Message]) -> MemoryState:
        state = self.engine.zero_state()
        if self.writing == "remember":
            for end in _turn_ends(told):
                state = self.engine.remember(told[:end], state).state
            return state
        history = [message for message in told if message.role == "system"]
        for message in told:
            if message.role == "user":
                history.append(message)
                turn = self.engine.turn(history, state, **self._options(self.window))
                assert turn.state is not None
                history.append(turn.message)
                state = turn.state
        return state

    def ask(
        self,
        engine: Engine,
        question: ArmQuestion,
        states: Mapping[int, MemoryState],
        banks: Mapping[int, MemoryBank],
    ) -> ArmReply:
        """One reply. Of the conversation the prompt shows its system messages, and what the arm shows."""
        started, parts = time.monotonic(), SETUPS[question.arm].parts
        if parts is None:
            return self._turn(engine, question, states, banks, self._quoted(engine, question, banks), started)
        drafting, showing = (replace(question, arm=arm) for arm in parts)
        probe = question.probe
        kept = len(states[self.sources(drafting)[0]].to_bytes()) + text_bytes(probe.told)
        quoted = None
        if engine.count_tokens([message for message in probe.told if message.role != "system"]) > MOST_TOLD:
            quoted = self._quoted(engine, showing, banks)
        spent = 0
        if quoted is None:
            draft = self._turn(engine, drafting, states, banks, None, started)
            said = [draft.message.content, *(json.dumps(dict(call.arguments)) for call in draft.message.tool_calls)]
            if not stands(" ".join(said), probe.ask.messages[-1].content, probe.told):
                quoted = self._quoted(engine, showing, banks, spent=draft.prompt_tokens)
            if quoted is None:
                return replace(draft, kept_bytes=kept)
            spent = draft.prompt_tokens
        shown = self._turn(engine, showing, states, banks, quoted, started)
        return replace(shown, prompt_tokens=spent + shown.prompt_tokens, kept_bytes=kept)

    def _quoted(
        self, engine: Engine, question: ArmQuestion, banks: Mapping[int, MemoryBank], spent: int = 0
    ) -> Message | None:
        """The message that quotes the conversation, for arms that have one; None too where nothing fits.

        Args:
            spent: tokens of a prompt before; with those the message takes no more than it would take without.
        """
        asked, told, setup = question.probe.ask, question.probe.told, SETUPS[question.arm]
        system = [message for message in told if message.role == "system"]
        search: Callable[[Callable[[Message], bool]], Message | None]
        if setup.shows in ("best", "nearest"):
            rank = self.nearest if setup.shows == "nearest" else None
            search = partial(excerpts, told, asked.messages[-1].content, rank=rank)
        elif setup.shows == "bank":
            search = partial(banks[question.probe.conversation].excerpts, asked.messages[-1].content)
        elif setup.shows == "compressed":
            assert self.compress is not None
            spoken = [message for message in told if message.role != "system"]
            share = self.context_tokens / max(1, engine.count_tokens(spoken))
            search = partial(compressed, told, share, compress=self.compress)
        else:
            return None

        def size(quoted: Message) -> int:
            return engine.count_tokens([*system, quoted, *asked.messages], asked.tools)

        room = self._room(engine, [*system, *asked.messages], asked.tools)
        quoted = search(lambda quoted: size(quoted) <= room)
        if spent and quoted is not None:
            room = size(quoted) - spent
            quoted = search(lambda quoted: size(quoted) <= room)
        return quoted

    def _turn(
        self,
        engine: Engine,
        question: ArmQuestion,
        states: Mapping[int, MemoryState],
        banks: Mapping[int, MemoryBank],
        quoted: Message | None,
        started: float,
    ) -> ArmReply:
        asked, told, setup = question.probe.ask, question.probe.told, SETUPS[question.arm]
        system = [message for message in told if message.role == "system"]
        options = self._options(self.window)
        options["tools"] = asked.tools
        options["memory"] = setup.memory is not None
        messages = [*system, *([] if quoted is None else [quoted]), *asked.messages]
        context = "" if quoted is None else quoted.content
        state = states[self.sources(question)[0]] if self.sources(question) else None
        if setup.shows == "all":
            messages, options["window"] = [*told, *asked.messages], Window(tokens=None)
        elif setup.shows == "last":
            room = self._room(engine, messages, asked.tools)
            messages, options["window"] = [*told, *asked.messages], Window(tokens=room)
        kept = 0 if state is None else len(state.to_bytes())
        if state is not None and (setup.memory == "foreign" or setup.shows == "nothing"):
            # With its record emptied, since the history of this turn is not what it has consumed.
            state = state.replaced(record=ConsumedRecord.empty())
        if setup.memory == "foreign" and setup.shows == "all":
            options["write"] = "off"  # else the prompt itself would fill the memory
        turn = engine.turn(messages, state, **options)
        seconds = time.monotonic() - started
        cut = setup.shows == "all" and turn.usage.input_tokens < engine.count_tokens(messages, asked.tools)
        if setup.shows == "bank":
            kept += banks[question.probe.conversation].bytes
        elif setup.shows == "compressed":
            kept += len(context.encode())
        elif setup.shows != "nothing":
            text = text_bytes(told)
            if setup.shows == "last":  # its part of the text, by tokens
                tokens = engine.count_tokens([*told, *asked.messages]) - engine.count_tokens([*system, *asked.messages])
                text = round(text * min(1.0, self.context_tokens / max(1, tokens)))
            kept += text
        return ArmReply(turn.message, turn.usage.input_tokens, seconds, cut, context, kept)

    def _room(self, engine: Engine, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> int:
        """Most tokens of a prompt that shows some of the conversation beside these messages."""
        wanted = engine.count_tokens(messages, tools) + self.context_tokens
        return min(wanted, engine.max_tokens_limit - self.max_tokens)

    def side_by_side(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Results for all items, in order. After an error nothing new is begun."""
        with ThreadPoolExecutor(max(1, self.concurrency), thread_name_prefix="agentmem-arms") as pool:
            try:
                return list(pool.map(work, items))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def key(self, probe: Probe, arm: Arm, constants: Mapping[str, str]) -> str:
        """Identifies a prediction."""
        place = [probe.conversation, digests(probe.told), self._written(probe, arm), self.writing]
        constant = [constants[probe.ask.kind]] if arm == "constant" else []
        return self._digest(probe, arm, [*place, probe.ask.values, probe.ask.kind, *constant])

    def prompt_key(self, question: ArmQuestion) -> str:
        """Equal for questions that get one reply, whatever conversation they belong to."""
        probe, arm = question.probe, question.arm
        if SETUPS[arm].memory in (None, "empty") and SETUPS[arm].shows == "nothing":
            return self._digest(probe, arm, [])
        return self._digest(probe, arm, [digests(probe.told), self._written(probe, arm), self.writing])

    def _written(self, probe: Probe, arm: Arm) -> list[str]:
        return [digests(self.told[number]) for number in self.sources(ArmQuestion(probe, arm, ""))]

    def _digest(self, probe: Probe, arm: Arm, place: Sequence[Any]) -> str:
        ask, engine, setup = probe.ask, self.engine, SETUPS[arm]
        fingerprints = [engine.model_fingerprint, engine.adapter_fingerprint if setup.memory is not None else ""]
        fingerprints += [self.static] * setup.static
        options: list[Any] = [self.max_tokens, self.window.messages, self.window.tokens]
        if setup.shows in ("last", "best", "nearest", "bank", "compressed"):
            options.append(self.context_tokens)
        if setup.shows == "best":
            options.append("passages")  # replies to whole messages, of older versions, are not taken up
        if setup.parts is not None:
            options.append("draft")  # nor are those of one turn
        system = digests([message for message in probe.told if message.role == "system"])
        asked = [system, digests(ask.messages), list(ask.tools)]
        body = [arm, asked, options, fingerprints, place]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:_KEY]

    def _options(self, window: Window) -> TurnOptions:
        return {"window": window, "sampling": Sampling(max_tokens=self.max_tokens)}


def _turn_ends(told: Sequence[Message]) -> list[int]:
    """Where each turn ends: before the next user message. What comes before the first one belongs to the first turn."""
    starts = [place for place, message in enumerate(told) if message.role == "user"]
    return [*starts[1:], len(told)]


def partners(told: Mapping[int, Sequence[Message]]) -> dict[int, int]:
    """For each conversation another one of the same number of user messages, or, if there is none, of the nearest.

    Conversations of one length form a ring, so that each memory is foreign to one conversation.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, messages in sorted(told.items()):
        by_length[sum(message.role == "user" for message in messages)].append(number)
    partners: dict[int, int] = {}
    for length, ring in by_length.items():
        others = [other for other in by_length if other != length]
        for place, number in enumerate(ring):
            if len(ring) > 1:
                partners[number] = ring[(place + 1) % len(ring)]
            elif others:
                partners[number] = by_length[min(others, key=lambda other: (abs(other - length), other))][0]
    return partners


def text_bytes(messages: Sequence[Message]) -> int:
    """Bytes of the texts of messages."""
    return sum(len(message.content.encode()) for message in messages)


def digests(messages: Sequence[Message]) -> str:
    return hashlib.sha256(b"".join(message.digest() for message in messages)).hexdigest()
