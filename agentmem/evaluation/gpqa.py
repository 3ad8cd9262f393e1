"""`gpqa`: questions of GPQA Diamond with four choices, asked with the memory full of other talk: does a memory do harm?

The file is behind a gate, so that its questions do not get into training data: whoever may read it has it.
"""

from __future__ import annotations

import csv
import io
import re
from functools import partial
from itertools import islice
from random import Random

from agentmem.errors import DataError
from agentmem.evaluation.talk import other_talk
from agentmem.evaluation.task import HARM_ARMS, SHORT_WORDS, Task, TaskData, by_hash, read_bytes
from agentmem.messages import Message
from agentmem.training.conversations import Ask, SourceFile
from agentmem.training.predictions import Probe

_FILE = "gpqa_diamond.csv"
_COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_LETTERS = "ABCD"


def gpqa(data: TaskData) -> Task:
    """`gpqa`: a reply is right if the one letter that it names is that of the right choice.

    The order of the choices is drawn from the seed and the question.
    """
    files = list[SourceFile]()
    path = data.path / _FILE
    text = read_bytes(path, files).decode("utf-8", "replace")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if not rows or any(not row.get(column) for row in rows for column in _COLUMNS):
        raise DataError(f"{path} has the columns {', '.join(_COLUMNS)}, filled in every row; fetch it again")
    asks = [_ask(row["Question"], [row[column] for column in _COLUMNS[1:]], data.seed) for row in rows]
    ordered = by_hash(asks, lambda ask: ask.messages[0].content)
    return Task(
        "gpqa",
        "the letter of the right choice of four is given (GPQA Diamond), with the memory full of other talk",
        tuple(
            Probe(talk, ask, number)
            for number, (ask, talk) in enumerate(zip(islice(ordered, data.limit), other_talk(data.seed), strict=False))
        ),
        arms=HARM_ARMS,
        max_words=SHORT_WORDS,
        licence="CC-BY-4.0",
        files=tuple(files),
    )


def _ask(question: str, choices: list[str], seed: int) -> Ask:
    """The question with its choices, the first of which is the right one, in an order of their own."""
    right = choices[0]
    Random(f"gpqa/{seed}/{question}").shuffle(choices)
    letter = _LETTERS[choices.index(right)]
    listed = "\n".join(f"({each}) {choice.strip()}" for each, choice in zip(_LETTERS, choices, strict=True))
    asked = f"{question.strip()}\n\n{listed}\n\nAnswer with the letter of the right choice alone."
    return Ask((Message("user", asked),), Message("assistant", letter), kind="diamond", check=partial(names, letter))


def names(letter: str, reply: str) -> bool:
    """Whether a reply names this letter, and no other of the four."""
    return set(re.findall(rf"\b[{_LETTERS}]\b", reply)) == {letter}
