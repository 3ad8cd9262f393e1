"""Tasks about long histories of people: `longmemeval`, `longmemeval-judge` and `locomo`.

They have questions whose answers are not written to be compared by a program. What can be is asked, judged by
`agentmem.evaluation.scoring.states`; the rest is left out and counted. The rest of LongMemEval is what
`longmemeval-judge` asks, where there is a model to judge it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from agentmem.errors import ConfigError
from agentmem.evaluation.scoring import locomo_f1, porter_stem, states
from agentmem.evaluation.task import Task, TaskData, by_hash, in_turn, other_form, read_objects
from agentmem.messages import Message
from agentmem.training.contexts import ARMS
from agentmem.training.conversations import Ask, SourceFile
from agentmem.training.predictions import Probe

SHORT_ANSWER = 40
"""Most characters of an answer of LongMemEval that is compared by its words."""

_JUDGED_TOKENS = 256  # most tokens of a reply that a model judges

_CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop"}
_DECLINE = 5

WRONG_ANSWERS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "conv-26": {
        "not in the talk": (2, 23, 26, 56, 149),
        "date": (5, 135),
        "speaker": (94, 138, 144),
        "debatable": (43, 66, 77),
        "incomplete": (32, 137),
    },
    "conv-30": {"date": (31,), "speaker": (57,), "debatable": (47, 63)},
    "conv-41": {"date": (48, 68, 69), "speaker": (129,), "debatable": (63,)},
    "conv-42": {
        "not in the talk": (4, 34, 52, 58, 61, 66, 81, 91),
        "date": (24, 43, 73),
        "speaker": (119,),
        "debatable": (68,),
        "incomplete": (5,),
    },
    "conv-43": {
        "not in the talk": (9, 128),
        "date": (6, 16, 56, 60),
        "speaker": (74, 86, 135, 136, 164, 165, 166),
    },
    "conv-44": {"not in the talk": (2,), "date": (5, 37, 57), "debatable": (4, 18, 41)},
    "conv-47": {"not in the talk": (2, 17), "date": (11, 31, 61, 88), "speaker": (37,), "debatable": (65,)},
    "conv-48": {"not in the talk": (0, 75, 87), "speaker": (116, 123, 174, 179)},
    "conv-49": {
        "not in the talk": (4, 18, 33, 36, 37, 43, 54, 106),
        "date": (74, 80, 102, 103),
        "speaker": (24, 144),
    },
    "conv-50": {
        "not in the talk": (1, 19, 60, 63),
        "date": (50, 62),
        "speaker": (88, 137, 147, 151),
        "debatable": (29, 72),
    },
}
"""Questions of LoCoMo whose answer is wrong, by conversation and by what is wrong: their places in its `qa`, from 0.

As found by the audit of dial481/locomo-audit (2026-02) in the file with the SHA-256 79fa87e9..., where an answer that
the talk bears out is counted wrong. Answers that only name the wrong evidence are not among them.
"""


# LongMemEval.


def longmemeval(data: TaskData) -> Task:
    """`longmemeval`: questions of the oracle set (only the sessions with evidence) that have a short answer."""

    def short(row: Mapping[str, Any], asked: str, answer: str, question: str) -> Ask | str:
        if _never_told(row):
            return "a question that was never answered, where the reply should say so (needs a judge)"
        if len(answer) > SHORT_ANSWER:
            return f"an answer of more than {SHORT_ANSWER} characters (needs a judge)"
        check = partial(states, answer, question)
        messages = (Message("user", f"{asked} Answer in a few words."),)
        return Ask(messages, Message("assistant", answer), (answer,), kind=row["question_type"], check=check)

    title = "a short answer about earlier sessions is stated (LongMemEval oracle, without a judge)"
    return _longmemeval(data, "longmemeval", title, short)


def longmemeval_judge(data: TaskData) -> Task:
    """`longmemeval-judge`: the questions of the oracle set that `longmemeval` leaves out, judged by a model.

    Raises:
        ConfigError: there is no judge.
    """
    judge = data.judge
    if judge is None:
        raise ConfigError(
            "the task longmemeval-judge needs a model that judges replies: name it (--judge MODEL, and --judge-url for "
            "an endpoint), or take longmemeval, which has the questions that need none"
        )

    def rest(row: Mapping[str, Any], asked: str, answer: str, question: str) -> Ask | str:
        never_told = _never_told(row)
        if not never_told and len(answer) <= SHORT_ANSWER:
            return "a short answer (asked by longmemeval)"
        check = partial(judge, row["question_type"], question, answer, never_told=never_told)
        kind = "never told" if never_told else row["question_type"]
        return Ask((Message("user", asked),), Message("assistant", answer), kind=kind, check=check)

    task = _longmemeval(
        data,
        "longmemeval-judge",
        f"a reply about earlier sessions is right as {judge.name} judges it (LongMemEval oracle, long answers and "
        "questions about what was never told)",
        rest,
    )
    arms = tuple(arm for arm in ARMS if arm != "constant")  # which would ask the judge of every pair
    return replace(task, arms=arms, max_tokens=_JUDGED_TOKENS, max_words=None)


def _longmemeval(
    data: TaskData, name: str, title: str, ask_of: Callable[[Mapping[str, Any], str, str, str], Ask | str]
) -> Task:
    """The questions for which `ask_of(row, question with its date, answer, question)` gives no reason to skip them."""
    files, skipped = list[SourceFile](), Counter[str]()
    path = data.path / "longmemeval_oracle.json"
    probes, sessions = list[Probe](), list[Sequence[str]]()
    for row in by_hash(read_objects(path, files), lambda row: str(row.get("question_id"))):
        try:
            question = str(row["question"])
            asked = f"{question} (Today is {_day(row['question_date'])}.)"
            ask = ask_of(row, asked, str(row["answer"]), question)
            if isinstance(ask, str):
                skipped[ask] += 1
            else:
                probes.append(Probe(tuple(_longmemeval_messages(row)), ask, len(probes)))
                sessions.append(row["haystack_session_ids"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise other_form(
                "longmemeval", "question, answer, dates, haystack_sessions and their ids", row, path, error
            ) from error
    clusters = _clusters(sessions)
    return Task(
        name,
        title,
        tuple(
            Probe(probe.told, probe.ask, probe.conversation, cluster)
            for probe, cluster in islice(zip(probes, clusters, strict=True), data.limit)
        ),
        licence="MIT",
        files=tuple(files),
        skipped=skipped,
    )


def _never_told(row: Mapping[str, Any]) -> bool:
    return str(row["question_id"]).endswith("_abs")


def _longmemeval_messages(row: Mapping[str, Any]) -> Iterator[Message]:
    """All sessions in the order of their dates, each user message with its date."""
    for date, session in sorted(
        zip(row["haystack_dates"], row["haystack_sessions"], strict=True), key=lambda pair: str(pair[0])
    ):
        for message in session:
            text = message["content"]
            yield Message(message["role"], f"[{_day(date)}] {text}" if message["role"] == "user" else text)


def _day(date: str) -> str:
    return date.split(" ")[0]


def _clusters(sessions: Sequence[Sequence[str]]) -> list[int]:
    """A number for each question; questions that share a session, directly or through others, have the same."""
    parent = list(range(len(sessions)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    first: dict[str, int] = {}
    for number, ids in enumerate(sessions):
        for session in ids:
            parent[root(number)] = root(first.setdefault(session, number))
    return [root(number) for number in range(len(sessions))]


# LoCoMo.


def locomo(data: TaskData) -> Task:
    """`locomo`: questions of categories 1 to 4 about ten long talks, but those whose answer is known to be wrong."""
    porter_stem()
    files, skipped = list[SourceFile](), Counter[str]()
    path = data.path / "locomo10.json"
    groups = list[list[Probe]]()
    for number, row in enumerate(read_objects(path, files)):
        try:
            told = tuple(_locomo_messages(row["conversation"]))
            wrong = WRONG_ANSWERS.get(row["sample_id"], {})
            probes = list[Probe]()
            for place, item in enumerate(row["qa"]):
                reasons = [reason for reason, places in wrong.items() if place in places]
                if item["category"] == _DECLINE:
                    skipped["a question to decline (who always declines is always right)"] += 1
                elif reasons:
                    skipped[f"a wrong answer: {reasons[0]} (errata)"] += 1
                else:
                    probes.append(Probe(told, _locomo_ask(item), number))
            groups.append(by_hash(probes, lambda probe: probe.ask.messages[0].content))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise other_form("locomo", "conversation and qa", row, path, error) from error
    return Task(
        "locomo",
        "the answer about a talk of many sessions is stated (LoCoMo, categories 1 to 4)",
        tuple(islice(in_turn(groups), data.limit)),
        licence="CC-BY-NC-4.0",
        files=tuple(files),
        skipped=skipped,
        scores={"LoCoMo F1": _locomo_score},
    )


def _locomo_ask(item: Mapping[str, Any]) -> Ask:
    category, answer, question = item["category"], str(item["answer"]), item["question"]
    return Ask(
        (Message("user", f"{question} Answer with a short phrase."),),
        Message("assistant", answer),
        (answer,),
        kind=_CATEGORIES[category],
        check=partial(_locomo_right, category, answer, question),
    )


def _locomo_right(category: int, answer: str, question: str, reply: str) -> bool:
    """All parts of an answer of category 1, the first alternative of one of category 3, or all of the answer."""
    if category == 1:
        parts = [part for part in answer.split(",") if part.strip()]
        # Together, so that the number of one part does not forbid that of another.
        return states(" ".join(parts), question, reply)
    return states(answer.split(";")[0] if category == 3 else answer, question, reply)


def _locomo_score(ask: Ask, reply: str) -> float:
    category = next(number for number, kind in _CATEGORIES.items() if kind == ask.kind)
    return locomo_f1(category, ask.reply.content, reply)


def _locomo_messages(conversation: Mapping[str, Any]) -> Iterator[Message]:
    """All sessions in order; the first speaker is the user. Each message says its day and who speaks."""
    names = {conversation["speaker_a"]: "user", conversation["speaker_b"]: "assistant"}
    number = 1
    while (
        session := conversation.get(f"session_{number}")
    ) is not None or f"session_{number}_date_time" in conversation:
        day = str(conversation[f"session_{number}_date_time"]).rpartition(" on ")[2]
        for turn in session or ():
            text = f"[{day}] {turn['speaker']}: {turn['text']}"
            if caption := turn.get("blip_caption"):
                text += f" (shares {caption})"
            yield Message("user" if names[turn["speaker"]] == "user" else "assistant", text)
        number += 1
    if number == 1:
        raise ValueError("there is no session_1")
