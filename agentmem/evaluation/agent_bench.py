"""`memoryagentbench`: MemoryAgentBench (Hu et al., 2025), from the files of its hub page (ai-hyz/MemoryAgentBench).

Each row has a long `context`, `questions`, for each of them accepted `answers`, and a `source` in its `metadata`. The
context is told in pieces, one a message, and each question is asked apart: what its authors call to inject once and to
query many times. Their own runner cuts pieces of 4,096 tokens; here they have at most `PIECE` characters, so that a
prompt that is cut loses little at once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

from agentmem.errors import DataError
from agentmem.evaluation.scoring import same_text, states
from agentmem.evaluation.task import Task, TaskData, by_hash, in_turn, other_form, read_objects
from agentmem.messages import Message
from agentmem.training.contexts import passages
from agentmem.training.conversations import Ask, SourceFile
from agentmem.training.judging import contains
from agentmem.training.predictions import Probe

SPLITS = {
    "Accurate_Retrieval": "accurate retrieval",
    "Test_Time_Learning": "test-time learning",
    "Long_Range_Understanding": "long-range understanding",
    "Conflict_Resolution": "conflict resolution",
}
"""The splits, which are the kinds of the questions."""

PIECE = 4000
"""Most characters of a message that tells a part of a context."""

_SHORT_ANSWER = 40  # characters; longer answers of LongMemEval are not compared by their words
_LEFT_OUT = {
    "recsys": "a recommendation, scored by its place in a list of films (not read)",
    "infbench_sum": "a summary (needs a judge)",
}
_LABELLED = "icl_"  # the sources that teach labels by examples


def memoryagentbench(data: TaskData) -> Task:
    """`memoryagentbench`: the questions whose answers can be compared by a program, of the splits that are there."""
    files, skipped = list[SourceFile](), Counter[str]()
    groups = list[list[Probe]]()
    for split, kind in SPLITS.items():
        paths = sorted(data.path.glob(f"**/{split}-*.parquet")) or [data.path / f"{split}.jsonl"]
        for row in (row for path in paths if path.is_file() for row in read_objects(path, files)):
            try:
                source = str(row["metadata"]["source"])
                pairs = list(zip(row["questions"], row["answers"], strict=True))
                told = tuple(Message("user", piece) for piece in pieces(row["context"]))
                asks = [_ask(source, kind, question, answers) for question, answers in pairs]
            except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
                expected = "a context, questions, a list of answers for each, and metadata with a source"
                raise other_form("memoryagentbench", expected, row, data.path, error) from error
            skipped.update(ask for ask in asks if isinstance(ask, str))
            probes = [Probe(told, ask, len(groups)) for ask in asks if not isinstance(ask, str)]
            groups.append(by_hash(probes, lambda probe: probe.ask.messages[0].content))
    if not files:
        raise DataError(
            f"memoryagentbench reads SPLIT-*.parquet or SPLIT.jsonl in {data.path}, where a split is one of "
            f"{', '.join(SPLITS)}; found none; fetch ai-hyz/MemoryAgentBench"
        )
    return Task(
        "memoryagentbench",
        "a question about a long context that was told in pieces is answered (MemoryAgentBench, without a judge)",
        tuple(islice(in_turn(groups), data.limit)),
        licence="MIT",
        files=tuple(files),
        skipped=skipped,
        scores={"its match": _match},
    )


def pieces(context: str, most: int = PIECE) -> list[str]:
    """A text in pieces of whole lines, of at most `most` characters; a longer line is cut between sentences."""
    cut = list[str]()
    parts = (part for line in context.split("\n") for part in ([line] if len(line) <= most else passages(line, most)))
    for part in parts:
        if cut and len(cut[-1]) + 1 + len(part) <= most:
            cut[-1] += f"\n{part}"
        elif part.strip():
            cut.append(part)
    return cut


def _ask(source: str, kind: str, question: str, answers: Sequence[str]) -> Ask | str:
    """The question, or why it is left out."""
    for prefix, reason in _LEFT_OUT.items():
        if source.startswith(prefix):
            return reason
    accepted = tuple(dict.fromkeys(str(answer) for answer in answers))
    check: Callable[[str], bool]
    if source.startswith(_LABELLED):
        asked = f"{question}\nWhich label does this have? Answer with the label alone."
        check = partial(_labels, accepted)
    elif source.startswith("longmemeval"):
        if len(accepted[0]) > _SHORT_ANSWER:
            return f"an answer of LongMemEval of more than {_SHORT_ANSWER} characters (needs a judge)"
        asked, check = f"{question} Answer in a few words.", partial(states, accepted[0], question)
    else:
        asked, check = f"{question} Answer in a few words.", partial(_has, accepted)
    return Ask((Message("user", asked),), Message("assistant", accepted[0]), accepted, kind=kind, check=check)


def _has(accepted: Sequence[str], reply: str) -> bool:
    return any(contains(reply, answer) for answer in accepted)


def _labels(accepted: Sequence[str], reply: str) -> bool:
    """Whether a reply has an accepted label, and no other number beside it."""
    numbers = set(re.findall(r"\d+", reply))
    return _has(accepted, reply) and numbers <= set(accepted)


def _match(ask: Ask, reply: str) -> float:
    """MemoryAgentBench's own match: labels are to be equal, other answers a part of the reply, articles aside."""
    exact = "Which label" in ask.messages[-1].content
    return float(any(same_text(answer, reply, whole=exact) for answer in ask.values))
