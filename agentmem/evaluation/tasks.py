"""The tasks that a memory is measured by: each reads its data and gives questions about conversations.

    sgd           a value that the user told four or more turns before is said again by the reply (dev of
                  Schema-Guided Dialogue)
    bfcl-memory   questions about five long conversations (Berkeley Function Calling Leaderboard, memory)
    longmemeval   questions about earlier sessions with an assistant (`agentmem.evaluation.histories`)
    longmemeval-judge   those of them that only a model can judge (there)
    locomo        questions about long talks of two people (there)
    hotpotqa      questions about ten paragraphs that were told before (`agentmem.evaluation.lessons`)
    ttl           labels that were taught by examples (there)
    memoryagentbench   questions about long contexts that were told in pieces (`agentmem.evaluation.agent_bench`)
    gpqa          questions of GPQA with four choices, with the memory full of other talk (`agentmem.evaluation.gpqa`)
    ifeval        instructions that a program checks, with the memory full of other talk: does a memory do harm?
    own           questions of the user's (`agentmem.evaluation.own`)

The data is read from folders that the user names, each inside one of the data directories (`FOLDERS`); that of `own` is
a file. A new task is a function from `TaskData` to a `Task`, and a line of `TASKS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from agentmem.errors import ConfigError, DataError
from agentmem.evaluation.agent_bench import memoryagentbench
from agentmem.evaluation.facts import SEED
from agentmem.evaluation.gpqa import gpqa
from agentmem.evaluation.histories import locomo, longmemeval, longmemeval_judge
from agentmem.evaluation.ifeval import ifeval_prompts
from agentmem.evaluation.judge import Judge
from agentmem.evaluation.lessons import hotpotqa, ttl
from agentmem.evaluation.own import own
from agentmem.evaluation.talk import other_talk
from agentmem.evaluation.task import HARM_ARMS, Task, TaskData, by_hash, in_turn, other_form, read_objects
from agentmem.messages import Message
from agentmem.training.conversations import Ask, SourceFile
from agentmem.training.datasets import SchemaGuidedDialogues
from agentmem.training.predictions import Probe

OWN = "own"
"""The task that reads a file of the user's."""

FOLDERS = {
    "sgd": "sgd",
    "bfcl-memory": "bfcl_memory",
    "longmemeval": "longmemeval",
    "longmemeval-judge": "longmemeval",
    "locomo": "locomo",
    "hotpotqa": "hotpotqa",
    "ttl": "mab_ttl",
    "ifeval": "ifeval",
    "gpqa": "gpqa",
    "memoryagentbench": "memoryagentbench",
}
"""The folder of each task's data inside a data directory."""

_BFCL_SCENARIOS = ("customer", "finance", "healthcare", "notetaker", "student")
_IFEVAL_TOKENS = 1280  # as in lm-eval; the longest text that a prompt asks for has 1,200 words


def open_task(
    name: str,
    data_dirs: Sequence[Path],
    limit: int | None = None,
    seed: int = SEED,
    *,
    own_file: Path | None = None,
    judge: Judge | None = None,
) -> Task:
    """Read a task's data.

    Args:
        name: a key of `TASKS`.
        data_dirs: directories, one of which has the task's folder (`FOLDERS`).
        limit: most questions; None: all. Any first so many are a fair sample.
        seed: what the task draws itself is drawn from it.
        own_file: the file of the task `own`.
        judge: judges the replies of the task `longmemeval-judge`.

    Raises:
        ConfigError: there is no such task, the limit is not 1 or more, or no directory, file or judge is given.
        DataError: no directory has the folder, or a file in it is missing or in another form.
        MissingExtraError: the task scores by a package that is not installed.
    """
    if name not in TASKS:
        raise ConfigError(f"tasks are {', '.join(TASKS)}; found {name!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"a task needs 1 question or more; found {limit}")
    if name == OWN:
        if own_file is None:
            raise ConfigError("the task own reads a JSONL file of questions; name it (--data)")
        return TASKS[name](TaskData(own_file, limit, seed))
    if not data_dirs:
        raise ConfigError(
            f"the task {name} reads {FOLDERS[name]}/ in a data directory; name the directory (--data-dir)"
        )
    for directory in data_dirs:
        if (folder := directory / FOLDERS[name]).is_dir():
            return TASKS[name](TaskData(folder, limit, seed, judge))
    places = ", ".join(str(directory / FOLDERS[name]) for directory in data_dirs)
    raise DataError(
        f"the task {name} reads one of the folders {places}, of which there is none; see docs/howto/evaluate"
    )


def _sgd(data: TaskData) -> Task:
    source = SchemaGuidedDialogues(data.path, train=False)
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
        rows = read_objects(data.path / f"memory_{scenario}.json", files)
        told[scenario] = tuple(message for row in rows for message in _bfcl_messages(row, scenario))
    answers = {row.get("id"): row for row in read_objects(data.path / "answers_BFCL_v4_memory.json", files)}
    asks: dict[str, list[Ask]] = {scenario: [] for scenario in _BFCL_SCENARIOS}
    for row in read_objects(data.path / "BFCL_v4_memory.json", files):
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
            raise other_form(
                "bfcl-memory", "id, question, scenario and an answer with its id", row, data.path, error
            ) from error
    probes = in_turn(
        [
            [Probe(told[scenario], ask, number) for ask in of_scenario]
            for number, (scenario, of_scenario) in enumerate(asks.items())
        ]
    )
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
    published = data.path / "ifeval_input_data.jsonl"  # as its hub page names it
    rows = read_objects(published if published.is_file() else data.path / "input_data.jsonl", files)
    prompts, skipped = ifeval_prompts(rows, data.path)
    prompts = by_hash(prompts, lambda prompt: prompt.text)
    talks = other_talk(data.seed)
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
        arms=HARM_ARMS,
        max_tokens=_IFEVAL_TOKENS,
        max_words=None,
        licence="Apache-2.0",
        files=tuple(files),
        skipped=skipped,
    )


TASKS: dict[str, Callable[[TaskData], Task]] = {
    "sgd": _sgd,
    "bfcl-memory": _bfcl_memory,
    "longmemeval": longmemeval,
    "longmemeval-judge": longmemeval_judge,
    "locomo": locomo,
    "hotpotqa": hotpotqa,
    "ttl": ttl,
    "ifeval": _ifeval,
    "gpqa": gpqa,
    "memoryagentbench": memoryagentbench,
    OWN: own,
}
"""All tasks, by name."""
