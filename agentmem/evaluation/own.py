"""`own`: questions of the user's, from a JSONL file.

A line has a conversation, a question about it and the accepted answers; the rest is optional:

    {"messages": [{"role": "user", "content": "My cat is called Mia."}, {"role": "assistant", "content": "Noted."}],
     "question": "What is my cat called?", "answers": ["Mia"], "choices": ["Mia", "Leo"], "kind": "names"}

Lines with equal messages are questions about one conversation.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from agentmem.evaluation.task import SHORT_WORDS, Task, TaskData
from agentmem.messages import Message
from agentmem.training.conversations import Ask, BadRow, parse_message, read_rows
from agentmem.training.judging import named
from agentmem.training.predictions import Probe

_KEYS = ("messages", "question", "answers", "choices", "kind")


def own(data: TaskData) -> Task:
    """`own`: a reply is right if it has an accepted answer as a whole, or names the right choice and no other."""
    rows = read_rows(data.path, _row)
    numbers: dict[tuple[bytes, ...], int] = {}
    probes = tuple(
        Probe(told, ask, numbers.setdefault(tuple(message.digest() for message in told), len(numbers)))
        for told, ask in rows.good[: data.limit]
    )
    return Task(
        "own",
        f"an accepted answer is given, in at most {SHORT_WORDS} words",
        probes,
        files=(rows.file,),
        skipped={"a bad line": len(rows.bad)} if rows.bad else {},
    )


def chooses(answers: Iterable[str], choices: Iterable[str], reply: str) -> bool:
    """Whether a reply names one of the answers and no choice beside them."""
    answers = set(answers)
    chosen = named(reply, {*answers, *choices})
    return bool(chosen) and chosen <= answers


def _row(row: object, origin: str) -> tuple[tuple[Message, ...], Ask]:
    if not isinstance(row, dict):
        raise BadRow("a row is a JSON object with `messages`, `question` and `answers`")
    if unknown := [key for key in row if key not in _KEYS]:
        raise BadRow(f"unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    listed = row.get("messages")
    if not isinstance(listed, list) or not listed:
        raise BadRow("`messages` is a list with at least one message")
    told = list[Message]()
    for number, plain in enumerate(listed, 1):
        try:
            told.append(parse_message(plain))
        except BadRow as error:
            raise BadRow(f"message {number}: {error}") from None
    question, kind = row.get("question"), row.get("kind", "")
    if not isinstance(question, str) or not question.strip():
        raise BadRow("`question` is text")
    if not isinstance(kind, str):
        raise BadRow("`kind` is text")
    answers, choices = _texts(row, "answers", least=1), _texts(row, "choices", least=0)
    if choices and not set(answers) <= set(choices):
        raise BadRow(f"each of `answers` is one of `choices`; found {min(set(answers) - set(choices))!r}")
    if choices:
        question = f"{question}\nAnswer with one of: {'; '.join(choices)}."
    check = partial(chooses, answers, choices) if choices else None
    ask = Ask((Message("user", question),), Message("assistant", answers[0]), answers, kind=kind, check=check)
    return tuple(told), ask


def _texts(row: dict[str, object], key: str, least: int) -> tuple[str, ...]:
    texts = row.get(key, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadRow(f"`{key}` is a list of texts")
    if len(texts) < least:
        raise BadRow(f"`{key}` has {least} text or more")
    return tuple(texts)
