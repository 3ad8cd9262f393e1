"""What a measurement asks, what is replied, the file that keeps it, and the shares and differences that follow."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from agentmem.engine import Engine
from agentmem.messages import Message, ToolCall
from agentmem.text import parse_json
from agentmem.training.contexts import ARMS, Arm
from agentmem.training.conversations import Ask
from agentmem.training.intervals import Gain, Mean, Share, gain, ratio, share
from agentmem.training.judging import judge


@dataclass(frozen=True)
class Probe:
    """A question about a conversation.

    Attributes:
        told: the conversation's messages, oldest first.
        ask: the question, and what a right reply contains.
        conversation: number of the conversation; probes with the same number share `told`.
        cluster: number of what is resampled together for an interval, where several conversations belong together; the
            conversation by default.
    """

    told: tuple[Message, ...]
    ask: Ask
    conversation: int
    cluster: int | None = None


@dataclass(frozen=True)
class ArmReply:
    """What an arm replied.

    Attributes:
        message: the reply, with its tool calls.
        prompt_tokens: number of tokens that the prompt showed.
        seconds: from the question to the end of the reply, with other turns under way; 0 where no model was asked, or
            where it was not noted.
        cut: whether the conversation was too long for the prompt that was to show all of it.
        context: what the prompt quoted of the conversation.
        kept_bytes: what has to be kept between the conversation and the question: the memory's state, the text of the
            messages, or both.
    """

    message: Message
    prompt_tokens: int
    seconds: float = 0.0
    cut: bool = False
    context: str = ""
    kept_bytes: int = 0


@dataclass(frozen=True)
class ArmQuestion:
    """A probe for an arm; `key` identifies what is asked, of what, and how, and is equal in every run."""

    probe: Probe
    arm: Arm
    key: str


@dataclass(frozen=True)
class Prediction:
    """The reply of an arm to a probe.

    Attributes:
        key: see `ArmQuestion`.
        arm: who replied.
        conversation: number of the conversation, or of what it belongs to (`Probe.cluster`).
        kind: the kind of the question.
        question: the last message of the prompt.
        values, forbidden: as in `Ask`.
        reply: the reply, with its tool calls.
        prompt_tokens: number of tokens that the prompt showed.
        right: whether the reply is right.
        named_forbidden: whether the reply contains a text of `forbidden`.
        seconds, cut, kept_bytes: as in `ArmReply`.
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
    seconds: float = field(default=0.0, compare=False)
    cut: bool = False
    kept_bytes: int = 0

    @classmethod
    def of(cls, question: ArmQuestion, reply: ArmReply, max_words: int | None) -> Prediction:
        """Judge a reply."""
        probe, ask = question.probe, question.probe.ask
        verdict = judge(ask, reply.message, max_words=max_words)
        return cls(
            key=question.key,
            arm=question.arm,
            conversation=probe.conversation if probe.cluster is None else probe.cluster,
            kind=ask.kind,
            question=ask.messages[-1].content,
            values=ask.values,
            forbidden=ask.forbidden,
            reply=reply.message,
            prompt_tokens=reply.prompt_tokens,
            right=verdict.right,
            named_forbidden=verdict.named_forbidden,
            seconds=reply.seconds,
            cut=reply.cut,
            kept_bytes=reply.kept_bytes,
        )


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

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the questions, in the order in which they first come."""
        return tuple(dict.fromkeys(prediction.kind for prediction in self.predictions))

    def counts(
        self, arm: Arm, counted: Callable[[Prediction], bool] = lambda prediction: prediction.right
    ) -> list[tuple[int, int]]:
        """(counted replies, questions) of each conversation; right replies are counted unless told otherwise."""
        by_conversation: dict[int, list[bool]] = defaultdict(list)
        for prediction in self.of_arm(arm):
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

    def gain_over(self, arm: Arm, *others: Arm) -> Gain:
        """The share of an arm minus the largest share of others, with a paired interval over conversations.

        Raises:
            ValueError: one of the arms was not measured.
        """
        return gain(self.counts(arm), [self.counts(other) for other in others])

    @property
    def gain(self) -> Gain:
        """Share of `memory` minus the larger share of `zero` and `foreign`, with a paired interval.

        Raises:
            ValueError: one of the three arms was not measured.
        """
        return self.gain_over("memory", "zero", "foreign")

    @property
    def score(self) -> float:
        """The value of `gain`: by it the best checkpoint is chosen."""
        return self.gain.value

    def prompt_tokens(self, arm: Arm) -> float:
        """The mean number of tokens that an arm's prompts showed."""
        return fmean(prediction.prompt_tokens for prediction in self.of_arm(arm))

    def seconds(self, arm: Arm) -> float:
        """The median time from a question to the end of the reply, with other turns under way."""
        return median(prediction.seconds for prediction in self.of_arm(arm))

    def cut(self, arm: Arm) -> int:
        """How many prompts had no room for the whole conversation that they were to show."""
        return sum(prediction.cut for prediction in self.of_arm(arm))

    def kept_bytes(self, arm: Arm) -> float:
        """The mean number of bytes that an arm keeps between conversation and question."""
        return fmean(prediction.kept_bytes for prediction in self.of_arm(arm))

    def share_of(self, arm: Arm, other: Arm) -> Mean | None:
        """The share of an arm divided by another's, with a paired interval; None if the other is never right."""
        return ratio(self.counts(arm), self.counts(other))

    def summary(self) -> str:
        """One line: each arm's share with its interval."""
        parts = []
        for arm in self.arms:
            of_arm = self.share(arm)
            parts.append(f"{arm} {of_arm.value:.3f} ({of_arm.low:.3f}-{of_arm.high:.3f})")
        return ", ".join(parts)

    def of_arm(self, arm: Arm) -> list[Prediction]:
        """An arm's predictions, in the order of the probes."""
        return [prediction for prediction in self.predictions if prediction.arm == arm]


class PredictionLog:
    """Replies by key, and the file that keeps them. A line that an interrupted process left unfinished is ignored.

    Args:
        path: the file, which need not exist; None: nothing is kept.
        labels: added to each line.
        engine: whose name and fingerprints each line has.
        max_words: most words of a right reply; None: any number.
    """

    def __init__(self, path: Path | None, labels: Mapping[str, Any], engine: Engine, max_words: int | None) -> None:
        self.replies: dict[str, ArmReply] = {}
        self._path = path
        self._max_words = max_words
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
        for line in text.split("\n"):
            try:
                row = parse_json(line)
                calls = tuple(ToolCall(name, arguments) for name, arguments in row["calls"])
                message = Message("assistant", row["reply"], calls)
                self.replies[row["key"]] = ArmReply(
                    message,
                    row["prompt_tokens"],
                    row.get("seconds", 0.0),  # lines of older versions have none of these four
                    row.get("cut", False),
                    row.get("context", ""),
                    row.get("kept_bytes", 0),
                )
            except (ValueError, TypeError, KeyError):
                continue
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def put(self, question: ArmQuestion, reply: ArmReply) -> None:
        """Keep a reply."""
        reply = replace(reply, seconds=round(reply.seconds, 4))  # so that it reads as it is kept
        self.replies[question.key] = reply
        if self._path is None:
            return
        probe, ask = question.probe, question.probe.ask
        row = {
            "key": question.key,
            "arm": question.arm,
            "conversation": probe.conversation if probe.cluster is None else probe.cluster,
            "kind": ask.kind,
            "prompt": [[message.role, message.content] for message in ask.messages],
            "context": reply.context,
            "values": ask.values,
            "forbidden": ask.forbidden,
            "reply": reply.message.content,
            "calls": [[call.name, call.arguments] for call in reply.message.tool_calls],
            "right": judge(ask, reply.message, max_words=self._max_words).right,
            "prompt_tokens": reply.prompt_tokens,
            "seconds": reply.seconds,
            "cut": reply.cut,
            "kept_bytes": reply.kept_bytes,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | self._labels, ensure_ascii=False) + "\n")


def best_constants(
    probes: Sequence[Probe], max_words: int | None, score: Callable[[Ask, str], float] | None = None
) -> dict[str, str]:
    """For each kind of question, the accepted value that would be right most often as the reply to all of them.

    Kinds whose questions have no values are not there. With a `score`, the value with the largest sum of scores.
    """

    def right(ask: Ask, value: str) -> float:
        return judge(ask, Message("assistant", value), max_words=max_words).right

    by_kind: dict[str, list[Ask]] = defaultdict(list)
    for probe in probes:
        by_kind[probe.ask.kind].append(probe.ask)
    best: dict[str, str] = {}
    for kind, asks in by_kind.items():
        candidates = dict.fromkeys(value for ask in asks for value in ask.values)
        total = {value: sum((score or right)(ask, value) for ask in asks) for value in candidates}
        if total:
            best[kind] = max(total, key=lambda value: total[value])
    return best
