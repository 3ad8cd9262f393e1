"""Tasks about long histories of people: `longmemeval` and `locomo`.

Both have questions whose answers are not written to be compared by a program. What can be is asked, judged by
`agentmem.evaluation.scoring.states`; the rest is left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from agentmem.evaluation.scoring import locomo_f1, porter_stem, states
from agentmem.evaluation.task import Task, TaskData, by_hash, in_turn, other_form, read_objects
from agentmem.messages import Message
from agentmem.training.conversations import Ask, SourceFile
from agentmem.training.predictions import Probe

SHORT_ANSWER = 40
"""Most characters of an answer of LongMemEval that is compared by its words."""

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
    files, skipped = list[SourceFile](), Counter[str]()
    path = data.path / "longmemeval_oracle.json"
    probes, sessions = list[Probe](), list[Sequence[str]]()
    for row in by_hash(read_objects(path, files), lambda row: str(row.get("question_id"))):
        try:
            answer, question = str(row["answer"]), str(row["question"])
            if str(row["question_id"]).endswith("_abs"):
                skipped["a question that was never answered, where the reply should say so (needs a judge)"] += 1
            elif len(answer) > SHORT_ANSWER:
                skipped[f"an answer of more than {SHORT_ANSWER} characters (needs a judge)"] += 1
            else:
                asked = f"{question} (Today is {_day(row['question_date'])}.) Answer in a few words."
                ask = Ask(
                    (Message("user", asked),),
                    Message("assistant", answer),
                    (answer,),
                    kind=row["question_type"],
                    check=partial(states, answer, question),
                )
                probes.append(Probe(tuple(_longmemeval_messages(row)), ask, len(probes)))
                sessions.append(row["haystack_session_ids"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise other_form(
                "longmemeval", "question, answer, dates, haystack_sessions and their ids", row, path, error
            ) from error
    clusters = _clusters(sessions)
    return Task(
        "longmemeval",
        "a short answer about earlier sessions is stated (LongMemEval oracle, without a judge)",
        tuple(
            Probe(probe.told, probe.ask, probe.conversation, cluster)
            for probe, cluster in islice(zip(probes, clusters, strict=True), data.limit)
        ),
        licence="MIT",
        files=tuple(files),
        skipped=skipped,
    )


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
