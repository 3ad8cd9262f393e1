"""Tasks about what was read or taught before: `hotpotqa` and `ttl`."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from random import Random
from typing import Any

from agentmem.errors import DataError
from agentmem.evaluation.scoring import hotpot_exact, hotpot_f1, states
from agentmem.evaluation.task import Task, TaskData, by_hash, in_turn, other_form, read_bytes, read_objects
from agentmem.messages import Message
from agentmem.text import parse_json
from agentmem.training.conversations import Ask, SourceFile
from agentmem.training.predictions import Probe

_HOTPOT_FILES = ("hipporag_train_100.json", "meve_dev_100.json", "amor_dev.jsonl")
# The whole dev set: as HotpotQA's own page has it, and as the hub has it.
_HOTPOT_DEV = ("hotpot_dev_distractor_v1.json", "distractor/validation-00000-of-00001.parquet")

LABELS = 8
"""How many labels a conversation of `ttl` teaches."""

EXAMPLES = 4
"""How many examples of each label."""

_LESSONS = 25  # conversations of each data set
_NUMBERS = range(10, 100)
_LABEL_WORDS = 10  # most words of a right reply


# HotpotQA.


def hotpotqa(data: TaskData) -> Task:
    """`hotpotqa`: ten paragraphs are told, one a message, and then a question that two of them answer."""
    files = list[SourceFile]()
    probes = list[tuple[tuple[Message, ...], Ask]]()
    whole = [name for name in _HOTPOT_DEV if (data.path / name).is_file()][:1]
    for name in whole or _HOTPOT_FILES:
        path = data.path / name
        for row in read_objects(path, files):
            try:
                answer, question = str(row["answer"]), str(row["question"])
                told = tuple(Message("user", f"{title}: {text}") for title, text in _paragraphs(row["context"]))
                ask = Ask(
                    (Message("user", f"{question} Answer in a few words."),),
                    Message("assistant", answer),
                    (answer,),
                    kind=row["type"],
                    check=partial(states, answer, question),
                )
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise other_form("hotpotqa", "question, answer, type and context", row, path, error) from error
            probes.append((told, ask))
    ordered = by_hash(probes, lambda probe: probe[1].messages[0].content)
    return Task(
        "hotpotqa",
        "a question that two of ten paragraphs answer, which were told before, is answered (HotpotQA)",
        tuple(Probe(told, ask, number) for number, (told, ask) in enumerate(ordered[: data.limit])),
        licence="CC-BY-SA-4.0",
        files=tuple(files),
        scores={
            "exact match": lambda ask, reply: hotpot_exact(ask.reply.content, reply),
            "HotpotQA F1": lambda ask, reply: hotpot_f1(ask.reply.content, reply),
        },
    )


def _paragraphs(context: Any) -> Iterator[tuple[str, str]]:
    """Title and text of each paragraph, from the official form (a list of pairs) or that of the hub (two columns)."""
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, Mapping) else context
    for title, sentences in pairs:
        yield str(title), "".join(sentences).strip()


# Learning at test time.


def ttl(data: TaskData) -> Task:
    """`ttl`: labelled examples are told, and then new ones are to be labelled. The labels are numbers.

    Each conversation draws its labels and their numbers anew, so that nothing but what was told says which number it
    is: neither the model's own knowledge nor the memory of another conversation.
    """
    files = list[SourceFile]()
    sets = {"banking77": _banking77(data, files), "clinc150": _clinc150(data, files)}
    lessons = in_turn(
        [
            [(name, *_lesson(train, test, Random(f"ttl/{data.seed}/{name}/{number}"))) for number in range(_LESSONS)]
            for name, (train, test) in sets.items()
        ]
    )
    probes = (
        Probe(told, Ask((Message("user", asked),), Message("assistant", label), (label,), others, kind=name), number)
        for number, (name, told, questions) in enumerate(lessons)
        for asked, label, others in questions
    )
    return Task(
        "ttl",
        f"the number that examples with the same intent were told with is given, one of {LABELS}",
        tuple(islice(probes, data.limit)),
        max_words=_LABEL_WORDS,
        licence="CC-BY-4.0 AND CC-BY-3.0",
        files=tuple(files),
    )


def _lesson(
    train: Mapping[str, Sequence[str]], test: Mapping[str, Sequence[str]], rng: Random
) -> tuple[tuple[Message, ...], list[tuple[str, str, tuple[str, ...]]]]:
    """What is told, and (question, label, other labels) of one new example of each label."""
    intents = rng.sample(sorted(train), LABELS)
    numbers = [str(number) for number in rng.sample(_NUMBERS, LABELS)]
    told, questions = list[Message](), list[tuple[str, str, tuple[str, ...]]]()
    for intent, number in zip(intents, numbers, strict=True):
        told += [Message("user", f"{text}\nlabel: {number}") for text in rng.sample(train[intent], EXAMPLES)]
        others = tuple(other for other in numbers if other != number)
        asked = f"{rng.choice(test[intent])}\nWhich label does this have? Answer with the number alone."
        questions.append((asked, number, others))
    rng.shuffle(told)
    rng.shuffle(questions)
    return tuple(told), questions


_Texts = Mapping[str, Sequence[str]]


def _banking77(data: TaskData, files: list[SourceFile]) -> tuple[_Texts, _Texts]:
    def texts(name: str) -> _Texts:
        path = data.path / name
        content = read_bytes(path, files).decode("utf-8")
        rows = list(csv.DictReader(io.StringIO(content, newline="")))
        try:
            return _by_label([(row["text"], row["category"]) for row in rows])
        except KeyError as error:
            raise DataError(f"{path} has the columns text and category; found no {error}; fetch it again") from error

    return _checked("banking77", texts("banking77_train.csv"), texts("banking77_test.csv"))


def _clinc150(data: TaskData, files: list[SourceFile]) -> tuple[_Texts, _Texts]:
    path = data.path / "clinc150_data_full.json"
    content = read_bytes(path, files)
    try:
        parts = parse_json(content)
        train, test = (_by_label([(text, label) for text, label in parts[part]]) for part in ("train", "test"))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} has `train` and `test`, lists of [text, label]; found another form ({error!r}); fetch it again"
        ) from error
    return _checked("clinc150", train, test)


def _by_label(rows: Sequence[tuple[str, str]]) -> _Texts:
    texts: dict[str, list[str]] = defaultdict(list)
    for text, label in rows:
        texts[label].append(text)
    return texts


def _checked(name: str, train: _Texts, test: _Texts) -> tuple[_Texts, _Texts]:
    """Only labels with enough examples, and enough of them."""
    usable = {label: texts for label, texts in train.items() if len(texts) >= EXAMPLES and test.get(label)}
    if len(usable) < LABELS:
        raise DataError(
            f"{name} has {LABELS} labels or more with {EXAMPLES} examples to tell and one to ask; found {len(usable)}"
        )
    return usable, test
