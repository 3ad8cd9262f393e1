"""The tasks that a memory is measured by: each reads its data and gives questions about conversations.

    sgd           a value that the user told four or more turns before is said again by the reply (dev of
                  Schema-Guided Dialogue)
    bfcl-memory   questions about five long conversations (Berkeley Function Calling Leaderboard, memory)
    ifeval        instructions that a program checks, with the memory full of other talk: does a memory do harm?

The data is read from folders that the user names, each inside one of the data directories (`FOLDERS`). A new task is a
function from `TaskData` to a `Task`, and a line of `TASKS`.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from agentmem.errors import ConfigError, DataError
from agentmem.evaluation.facts import SEED
from agentmem.evaluation.ifeval import ifeval_prompts
from agentmem.messages import Message
from agentmem.training.contexts import ARMS, Arm
from agentmem.training.conversations import Ask, SourceFile, read_file
from agentmem.training.datasets import SchemaGuidedDialogues
from agentmem.training.episodes import EpisodeConfig, FactEpisodes
from agentmem.training.predictions import Probe
from agentmem.training.sources import as_conversation

FOLDERS = {"sgd": "sgd", "bfcl-memory": "bfcl_memory", "ifeval": "ifeval"}
"""The folder of each task's data inside a data directory."""

_SHORT_REPLY = 48  # tokens: the longest value with a sentence around it
_SHORT_WORDS = 40
_BFCL_SCENARIOS = ("customer", "finance", "healthcare", "notetaker", "student")
_IFEVAL_TOKENS = 1280  # as in lm-eval; the longest text that a prompt asks for has 1,200 words


@dataclass(frozen=True)
class TaskData:
    """What a task is opened with: its folder, most questions (None: all there are), and the seed."""

    folder: Path
    limit: int | None = None
    seed: int = SEED


@dataclass(frozen=True)
class Task:
    """A task with its questions.

    Attributes:
        name: the key in `TASKS`.
        title: what a right reply shows.
        probes: the questions.
        arms: who can be asked.
        max_tokens: most tokens of a reply.
        max_words: most words of a right reply; None: any number.
        licence: of the data, an SPDX identifier.
        files: the files that were read.
        skipped: what was left out, by reason.
    """

    name: str
    title: str
    probes: tuple[Probe, ...]
    arms: tuple[Arm, ...] = ARMS
    max_tokens: int = _SHORT_REPLY
    max_words: int | None = _SHORT_WORDS
    licence: str = ""
    files: tuple[SourceFile, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)


def open_task(name: str, data_dirs: Sequence[Path], limit: int | None = None, seed: int = SEED) -> Task:
    """Read a task's data.

    Args:
        name: a key of `TASKS`.
        data_dirs: directories, one of which has the task's folder (`FOLDERS`).
        limit: most questions; None: all. Any first so many are a fair sample.
        seed: what the task draws itself is drawn from it.

    Raises:
        ConfigError: there is no such task, the limit is not 1 or more, or no directory is given.
        DataError: no directory has the folder, or a file in it is missing or in another form.
        MissingExtraError: the task scores by a package that is not installed.
    """
    if name not in TASKS:
        raise ConfigError(f"tasks are {', '.join(TASKS)}; found {name!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"a task needs 1 question or more; found {limit}")
    if not data_dirs:
        raise ConfigError(
            f"the task {name} reads {FOLDERS[name]}/ in a data directory; name the directory (--data-dir)"
        )
    for directory in data_dirs:
        if (folder := directory / FOLDERS[name]).is_dir():
            return TASKS[name](TaskData(folder, limit, seed))
    places = ", ".join(str(directory / FOLDERS[name]) for directory in data_dirs)
    raise DataError(
        f"the task {name} reads one of the folders {places}, of which there is none; see docs/howto/evaluate"
    )


def _sgd(data: TaskData) -> Task:
    source = SchemaGuidedDialogues(data.folder, train=False)
    conversations = source.held_out(10**9)
    # Items of one dialogue share its words, so they are resampled together.
    dialogues = [conversation.origin.rpartition(":")[0] for conversation in conversations]
    clusters = {dialogue: number for number, dialogue in enumerate(dict.fromkeys(dialogues))}
    probes = (
        Probe(conversation.messages, ask, number, clusters[dialogues[number]])
        for number, conversation in enumerate(conversations)
        for ask in conversation.asks
    )
    return Task(
        "sgd",
        "a value told four or more turns before is said again",
        tuple(islice(probes, data.limit)),
        licence=source.licence,
        files=source.files,
        skipped=source.skipped,
    )


def _bfcl_memory(data: TaskData) -> Task:
    files = list[SourceFile]()
    told = {}
    for scenario in _BFCL_SCENARIOS:
        rows = _rows(data.folder / f"memory_{scenario}.json", files)
        told[scenario] = tuple(message for row in rows for message in _bfcl_messages(row, scenario))
    answers = {row.get("id"): row for row in _rows(data.folder / "answers_BFCL_v4_memory.json", files)}
    asks: dict[str, list[Ask]] = {scenario: [] for scenario in _BFCL_SCENARIOS}
    for row in _rows(data.folder / "BFCL_v4_memory.json", files):
        try:
            accepted = tuple(str(answer) for answer in answers[row["id"]]["ground_truth"])
            question = _bfcl_messages(row, row["scenario"])
            asks[row["scenario"]].append(
                Ask(
                    question,
                    Message("assistant", accepted[0]),
                    accepted,
                    kind=row["scenario"],
                    check=partial(bfcl_accepts, accepted),
                )
            )
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"a question of bfcl-memory has id, question, scenario and an answer with its id; found {row!r:.120} "
                f"({error!r}); fetch the files of {data.folder} again"
            ) from error
    asked = [
        (place, number, scenario, ask)
        for number, (scenario, of_scenario) in enumerate(asks.items())
        for place, ask in enumerate(of_scenario)
    ]
    asked.sort(key=itemgetter(0, 1))  # one of each conversation in turn, so that any first so many are from all of them
    probes = (Probe(told[scenario], ask, number) for _, number, scenario, ask in asked)
    return Task(
        "bfcl-memory",
        "a question about a long conversation is answered (BFCL memory)",
        tuple(islice(probes, data.limit)),
        licence="Apache-2.0",
        files=tuple(files),
    )


def _bfcl_messages(row: Mapping[str, Any], scenario: str) -> tuple[Message, ...]:
    try:
        return tuple(Message(message["role"], message["content"]) for turn in row["question"] for message in turn)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the conversations of bfcl-memory ({scenario}) have `question`, a list of turns of messages; found "
            f"another form ({error!r})"
        ) from error


def bfcl_accepts(accepted: Iterable[str], reply: str) -> bool:
    """Whether a reply has one of the accepted answers, as BFCL compares them.

    Letter case and the signs , . / - _ * ^ ( ) do not count, and the answer is there as whole words.
    """
    text = _bfcl_plain(reply)
    return any(re.search(rf"\b{re.escape(_bfcl_plain(answer))}\b", text) is not None for answer in accepted)


def _bfcl_plain(text: str) -> str:
    return re.sub(r"[,./\-_*^()]", "", text).lower().replace("'", '"')


def _ifeval(data: TaskData) -> Task:
    files = list[SourceFile]()
    rows = _rows(data.folder / "input_data.jsonl", files)
    prompts, skipped = ifeval_prompts(rows, data.folder)
    # By hash, so that any first so many are a fair sample.
    prompts.sort(key=lambda prompt: zlib.crc32(prompt.text.encode()))
    talks = _talks(data.seed)
    return Task(
        "ifeval",
        "all instructions of a prompt are followed (IFEval, strict), with the memory full of other talk",
        tuple(
            Probe(
                talk,
                Ask((Message("user", prompt.text),), Message("assistant", ""), kind="prompt", check=prompt.check),
                number,
            )
            for number, (prompt, talk) in enumerate(zip(islice(prompts, data.limit), talks, strict=False))
        ),
        arms=("bare", "zero", "memory", "foreign"),
        max_tokens=_IFEVAL_TOKENS,
        max_words=None,
        licence="Apache-2.0",
        files=tuple(files),
        skipped=skipped,
    )


def _talks(seed: int) -> Iterator[tuple[Message, ...]]:
    """Conversations that have nothing to do with what is asked: 8 facts, and 8 turns of other talk."""
    episodes = FactEpisodes(seed, EpisodeConfig(facts=(8, 8), fillers=(8, 8)))
    number = 0
    while True:
        yield as_conversation(episodes.episode(number)).messages
        number += 1


TASKS: dict[str, Callable[[TaskData], Task]] = {"sgd": _sgd, "bfcl-memory": _bfcl_memory, "ifeval": _ifeval}
"""All tasks, by name."""


def _rows(path: Path, files: list[SourceFile]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, which may be compressed as .xz; `files` gets the file."""
    compressed = path.with_name(path.name + ".xz")
    file, content = read_file(compressed if compressed.is_file() and not path.is_file() else path)
    files.append(file)
    try:
        rows = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    except ValueError as error:
        raise DataError(f"{file.path} has one JSON object per line; found another form ({error})") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file.path} has one JSON object per line; found {'no line' if not rows else 'other values'}")
    return rows
