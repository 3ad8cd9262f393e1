"""Measures a memory with its controls: questions about conversations that are no longer in the prompt.

Each conversation is written into a memory through the engine, turn by turn, and each question about it is asked apart,
from the state at the end of the conversation, with nothing of the conversation in the prompt. The arms differ only in
what the model may know:

    memory    the conversation's own memory
    zero      an empty memory
    foreign   the memory of another conversation of the same length
    bare      the model without memory, and the question alone
    whole     the model without memory, and the whole conversation in the prompt

A memory is useful as far as its share of right replies exceeds that of the better of zero and foreign
(`ArmResults.score`). Decoding is greedy. Replies are judged by their text (`agentmem.training.judging`).

Turns run side by side, so that the engine decodes them in one batch. What zero and bare reply depends on the question
alone, so each is asked once.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from agentmem.engine import Engine
from agentmem.errors import ConfigError
from agentmem.generation.plan import TurnOptions
from agentmem.generation.sampling import Sampling
from agentmem.messages import Message, ToolCall
from agentmem.prompt.transcript import Window
from agentmem.record import ConsumedRecord
from agentmem.state import MemoryState
from agentmem.training.conversations import Ask, Conversation
from agentmem.training.intervals import Gain, Share, gain, share
from agentmem.training.judging import MAX_WORDS, is_judged, judge

Arm = Literal["memory", "zero", "foreign", "bare", "whole"]
ARMS: tuple[Arm, ...] = get_args(Arm)
CONTROLLED: tuple[Arm, ...] = ("memory", "zero", "foreign")
"""The arms that a score needs."""

Writing = Literal["remember", "live"]

MAX_TOKENS = 24
"""Most tokens of a reply: answers are short, and a control that knows nothing may go on for ever."""

_LAST_MESSAGE = Window(messages=1)
_KEY = 16  # hexadecimal digits of a prediction's key
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Probe:
    """A question about a conversation.

    Attributes:
        told: the conversation's messages, oldest first.
        ask: the question, and what a right reply contains.
        conversation: number of the conversation; probes with the same number share `told`.
    """

    told: tuple[Message, ...]
    ask: Ask
    conversation: int


@dataclass(frozen=True)
class Prediction:
    """The reply of an arm to a probe.

    Attributes:
        key: identifies what was asked, of what, and how; equal in every run.
        arm: who replied.
        conversation: number of the conversation.
        kind: the kind of the question.
        question: the last message of the prompt.
        values, forbidden: as in `Ask`.
        reply: the reply, with its tool calls.
        prompt_tokens: number of tokens that the prompt showed.
        right: whether the reply is right.
        named_forbidden: whether the reply contains a text of `forbidden`.
    """

    key: str
    arm: Arm
    conversation: int
    kind: str
    question: str
    values: tuple[str, ...]
    forbidden: tuple[str, ...]
    reply: Message
    prompt_tokens: int
    right: bool
    named_forbidden: bool


@dataclass(frozen=True)
class ArmResults:
    """All predictions of a measurement, in the order of the probes, arm by arm."""

    predictions: tuple[Prediction, ...]

    def of_kind(self, *kinds: str) -> ArmResults:
        """The results for questions of these kinds."""
        return ArmResults(tuple(p for p in self.predictions if p.kind in kinds))

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that were measured."""
        measured = {prediction.arm for prediction in self.predictions}
        return tuple(arm for arm in ARMS if arm in measured)

    def counts(
        self, arm: Arm, counted: Callable[[Prediction], bool] = lambda prediction: prediction.right
    ) -> list[tuple[int, int]]:
        """(counted replies, questions) of each conversation; right replies are counted unless told otherwise."""
        by_conversation: dict[int, list[bool]] = defaultdict(list)
        for prediction in self.predictions:
            if prediction.arm == arm:
                by_conversation[prediction.conversation].append(counted(prediction))
        return [(sum(replies), len(replies)) for _, replies in sorted(by_conversation.items())]

    def share(self, arm: Arm) -> Share:
        """The share of right replies, with an interval over conversations.

        Raises:
            ValueError: the arm was not measured.
        """
        return share(self.counts(arm))

    def share_naming_forbidden(self, arm: Arm) -> Share:
        """The share of replies that contain a value that is ruled out, such as one that was changed since."""
        return share(self.counts(arm, lambda prediction: prediction.named_forbidden))

    @property
    def gain(self) -> Gain:
        """Share of `memory` minus the larger share of `zero` and `foreign`, with a paired interval.

        Raises:
            ValueError: one of the three arms was not measured.
        """
        return gain(self.counts("memory"), [self.counts("zero"), self.counts("foreign")])

    @property
    def score(self) -> float:
        """The value of `gain`: by it the best checkpoint is chosen."""
        return self.gain.value

    def summary(self) -> str:
        """One line: each arm's share with its interval."""
        parts = []
        for arm in self.arms:
            of_arm = self.share(arm)
            parts.append(f"{arm} {of_arm.value:.3f} ({of_arm.low:.3f}-{of_arm.high:.3f})")
        return ", ".join(parts)


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
    max_tokens: int = MAX_TOKENS,
    max_words: int = MAX_WORDS,
    concurrency: int = 32,
    predictions: Path | None = None,
    labels: Mapping[str, Any] | None = None,
    asker: Callable[[], Engine] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ArmResults:
    """Ask all probes of all arms.

    Args:
        engine: the model and its memory; without an adapter, only `bare` and `whole` can be measured. An engine takes
            the adapter's fingerprint when it is made, so make a new one after the adapter was trained on.
        probes: the questions; see `probes_of`.
        arms: who is asked.
        writing: how a conversation is written: "remember" = `Engine.remember`, one turn after another, with the
            replies as they are given; "live" = `Engine.turn` for each user message, the replies being the model's own.
        window: what a prompt shows, in "live" turns and in questions (`whole` shows everything).
        max_tokens: most tokens of a reply.
        max_words: most words of a right reply.
        concurrency: how many turns run at once.
        predictions: a JSONL file that gets a line for each prediction. Those that are in it already are not asked
            again, so an interrupted measurement is continued.
        labels: added to each line of the file.
        asker: makes the engine that asks, where it is not the one that writes; states go to it as JSON, as through a
            file. It is not closed here.
        on_progress: is given the numbers of predictions made and of all predictions.

    Raises:
        ConfigError: there is no probe, an arm is unknown, or no other conversation is there for `foreign`; or
            conversations with tool results are to be written live.
        MissingAdapterError: an arm needs memory and the engine has none.
    """
    run = _Measurement(engine, tuple(probes), writing, window, max_tokens, concurrency)
    run.check(arms)
    log = _PredictionLog(predictions, dict(labels or {}), engine)
    questions = [_Question(probe, arm, run.key(probe, arm)) for arm in arms for probe in run.probes]
    pending = [question for question in questions if question.key not in log.replies]
    total, done = len(questions), len(questions) - len(pending)

    groups: dict[str, list[_Question]] = defaultdict(list)  # one reply for each group
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

    def ask(group: list[_Question]) -> None:
        nonlocal done
        reply = run.ask(asking, group[0], states)
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
        run.side_by_side(ask, list(groups.values()))
    return ArmResults(tuple(_judged(question, log.replies[question.key], max_words) for question in questions))


@dataclass(frozen=True)
class _Question:
    probe: Probe
    arm: Arm
    key: str


@dataclass(frozen=True)
class _Reply:
    message: Message
    prompt_tokens: int


@dataclass
class _Measurement:
    """What all predictions of a measurement share."""

    engine: Engine
    probes: tuple[Probe, ...]
    writing: Writing
    window: Window
    max_tokens: int
    concurrency: int
    told: dict[int, tuple[Message, ...]] = field(init=False)
    foreign: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.told = {probe.conversation: probe.told for probe in self.probes}
        self.foreign = _partners(self.told)

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
        if self.writing not in get_args(Writing):
            raise ConfigError(f"writing is {' or '.join(get_args(Writing))}; found {self.writing!r}")
        if self.writing == "live" and any(message.role == "tool" for told in self.told.values() for message in told):
            raise ConfigError('conversations with tool results cannot be had anew; write them with "remember"')
        if set(arms) & set(CONTROLLED):
            self.engine.zero_state()  # raises where there is no memory

    def sources(self, question: _Question) -> list[int]:
        """The conversation whose memory a question is asked with; none for the arms that have none."""
        number = question.probe.conversation
        return {"memory": [number], "foreign": [self.foreign.get(number, number)]}.get(question.arm, [])

    def write(self, numbers: Iterable[int]) -> dict[int, MemoryState]:
        """The states that the conversations end with."""
        ordered = sorted(numbers)
        return dict(zip(ordered, self.side_by_side(lambda n: self._write(self.told[n]), ordered), strict=True))

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

    def ask(self, engine: Engine, question: _Question, states: Mapping[int, MemoryState]) -> _Reply:
        """One reply. Of the conversation the prompt shows its system messages only, but for `whole` all of it."""
        asked, told = question.probe.ask, question.probe.told
        options = self._options(self.window)
        options["tools"] = asked.tools
        state = None
        if question.arm == "whole":
            options["window"] = Window(tokens=None)
        else:
            told = tuple(message for message in told if message.role == "system")
        if question.arm in ("bare", "whole"):
            options["memory"] = False
        for number in self.sources(question):
            # With its record emptied, since the history of this turn begins with the question.
            state = states[number].replaced(record=ConsumedRecord.empty())
        turn = engine.turn([*told, *asked.messages], state, **options)
        return _Reply(turn.message, turn.usage.input_tokens)

    def side_by_side(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Results for all items, in order. After an error nothing new is begun."""
        with ThreadPoolExecutor(max(1, self.concurrency), thread_name_prefix="agentmem-arms") as pool:
            try:
                return list(pool.map(work, items))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def key(self, probe: Probe, arm: Arm) -> str:
        """Identifies a prediction."""
        sources = self.sources(_Question(probe, arm, ""))
        written = [_digests(self.told[number]) for number in sources]
        place = [probe.conversation, _digests(probe.told), written, self.writing]
        return self._digest(probe, arm, [*place, probe.ask.values, probe.ask.kind])

    def prompt_key(self, question: _Question) -> str:
        """Equal for questions that get one reply, whatever conversation they belong to."""
        return self._digest(question.probe, question.arm, []) if question.arm in ("zero", "bare") else question.key

    def _digest(self, probe: Probe, arm: Arm, place: Sequence[Any]) -> str:
        ask, engine = probe.ask, self.engine
        memory = arm in CONTROLLED
        fingerprints = [engine.model_fingerprint, engine.adapter_fingerprint if memory else ""]
        options = [self.max_tokens, self.window.messages, self.window.tokens]
        system = _digests([message for message in probe.told if message.role == "system"])
        asked = [system, _digests(ask.messages), list(ask.tools)]
        body = [arm, asked, options, fingerprints, place]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:_KEY]

    def _options(self, window: Window) -> TurnOptions:
        return {"window": window, "sampling": Sampling(max_tokens=self.max_tokens)}


class _PredictionLog:
    """Replies by key, and the file that keeps them. A line that an interrupted process left unfinished is ignored."""

    def __init__(self, path: Path | None, labels: dict[str, Any], engine: Engine) -> None:
        self.replies: dict[str, _Reply] = {}
        self._path = path
        self._labels = {
            **labels,
            "model": engine.name,
            "model_fingerprint": engine.model_fingerprint,
            "adapter_fingerprint": engine.adapter_fingerprint,
        }
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text("utf-8") if path.exists() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
                calls = tuple(ToolCall(name, arguments) for name, arguments in row["calls"])
                self.replies[row["key"]] = _Reply(Message("assistant", row["reply"], calls), row["prompt_tokens"])
            except (ValueError, TypeError, KeyError):
                continue
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def put(self, question: _Question, reply: _Reply) -> None:
        """Keep a reply."""
        self.replies[question.key] = reply
        if self._path is None:
            return
        ask = question.probe.ask
        row = {
            "key": question.key,
            "arm": question.arm,
            "conversation": question.probe.conversation,
            "kind": ask.kind,
            "prompt": [[message.role, message.content] for message in ask.messages],
            "values": ask.values,
            "forbidden": ask.forbidden,
            "reply": reply.message.content,
            "calls": [[call.name, call.arguments] for call in reply.message.tool_calls],
            "right": judge(ask, reply.message).right,
            "prompt_tokens": reply.prompt_tokens,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | self._labels, ensure_ascii=False) + "\n")


def _judged(question: _Question, reply: _Reply, max_words: int) -> Prediction:
    ask = question.probe.ask
    verdict = judge(ask, reply.message, max_words=max_words)
    return Prediction(
        key=question.key,
        arm=question.arm,
        conversation=question.probe.conversation,
        kind=ask.kind,
        question=ask.messages[-1].content,
        values=ask.values,
        forbidden=ask.forbidden,
        reply=reply.message,
        prompt_tokens=reply.prompt_tokens,
        right=verdict.right,
        named_forbidden=verdict.named_forbidden,
    )


def _turn_ends(told: Sequence[Message]) -> list[int]:
    """Where each turn ends: before the next user message. What comes before the first one belongs to the first turn."""
    starts = [place for place, message in enumerate(told) if message.role == "user"]
    return [*starts[1:], len(told)]


def _partners(told: Mapping[int, Sequence[Message]]) -> dict[int, int]:
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


def _digests(messages: Sequence[Message]) -> str:
    return hashlib.sha256(b"".join(message.digest() for message in messages)).hexdigest()
