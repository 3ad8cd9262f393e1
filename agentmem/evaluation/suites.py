"""The delta-mem paper's table (arXiv 2605.12357v1, tables 1 and 2), measured again with the controls that it lacks.

`agentmem evaluate --suite paper` asks the benchmarks whose data is there, of every arm, and fills this table. What the
paper measured and this can measure are not the same in all points; `NOTES` says where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmem.errors import ConfigError, DataError
from agentmem.evaluation.tasks import FOLDERS
from agentmem.training.contexts import COMPRESSED, STATIC, Arm

PAPER_MODEL = "Qwen/Qwen3-4B-Instruct-2507"
"""The model of the paper's figures below."""

PAPER_ADAPTER = "declare-lab/delta-mem_qwen3_4b-instruct"
"""The only adapter that the authors have released: token writing, for this model."""

SUITE_CONTEXT_TOKENS = 2048
"""Tokens that arms with some of the conversation show: the model is large enough for more than the usual 128."""

SUITE_ARMS: tuple[Arm, ...] = (
    "memory",
    "zero",
    "foreign",
    "bare",
    "whole",
    "whole_memory",
    "whole_foreign",
    "retrieval",
    "memory_bank",
    "constant",
)
"""What is measured where nothing else is asked for."""


@dataclass(frozen=True)
class Benchmark:
    """A column of the table.

    Attributes:
        title: its name and measure in the paper.
        task: the task that measures it.
        score: the published score of the task that is the paper's measure; "" = the share of right replies.
        shown: whether the paper's prompt has the conversation; else there is none.
        needed: what to do where it was not measured.
        part: a task and a kind of its questions that measure it; where they were measured they take the place of
            `task`.
    """

    title: str
    task: str
    score: str
    shown: bool
    needed: str
    part: tuple[str, str] | None = None


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("IFEval, prompt-strict", "ifeval", "", False, "`ifeval/` in --data-dir"),
    Benchmark("HotpotQA, EM", "hotpotqa", "exact match", True, "`hotpotqa/` in --data-dir"),
    Benchmark("GPQA Diamond", "gpqa", "", False, "`gpqa/gpqa_diamond.csv`, from its gated hub page"),
    Benchmark("MemoryAgentBench", "memoryagentbench", "", True, "`memoryagentbench/`, from its hub page"),
    Benchmark(
        "its TTL",
        "ttl",
        "",
        True,
        "`memoryagentbench/`, or `mab_ttl/` in --data-dir",
        part=("memoryagentbench", "test-time learning"),
    ),
    Benchmark("LoCoMo, F1", "locomo", "LoCoMo F1", True, "`locomo/` in --data-dir"),
)
"""The columns, in the paper's order."""


@dataclass(frozen=True)
class PaperRow:
    """A row of the table.

    Attributes:
        title: what the paper calls it.
        figures: its figures in percent, in the order of `BENCHMARKS`; None = not given. Empty = not in the paper.
        shown, alone: the arms that measure it where the prompt has the conversation, and where there is none; None =
            nothing here does.
        note: what stands beside the title.
    """

    title: str
    figures: tuple[float | None, ...]
    shown: Arm | None
    alone: Arm | None
    note: str = ""

    def arm(self, benchmark: Benchmark) -> Arm | None:
        """The arm that measures this row of a benchmark."""
        return self.shown if benchmark.shown else self.alone


PAPER_ROWS: tuple[PaperRow, ...] = (
    PaperRow("Qwen3-4B-Instruct", (81.89, 42.35, 39.39, 29.54, 26.14, 40.79), "whole", "bare"),
    PaperRow("BM25 retrieval", (None, 40.35, None, 24.49, 9.74, 36.68), "retrieval", None),
    PaperRow("LLMLingua-2", (None, 36.93, None, 15.63, 1.43, 40.98), "llmlingua", None),
    PaperRow("MemoryBank", (None, None, None, 17.65, 7.67, 38.14), "memory_bank", None),
    PaperRow("Context2LoRA", (76.71, 37.85, 29.29, 32.53, 29.86, 48.11), "static_whole", "static", "a static LoRA"),
    PaperRow("MemGen", (39.37, 5.36, 38.89, 29.61, 28.45, 40.05), None, None, "the paper's figures only"),
    PaperRow("MLP Memory", (24.95, 10.94, 22.73, 28.80, 26.00, 26.85), None, None, "the paper's figures only"),
    PaperRow("delta-mem, token writing", (82.99, 49.41, 40.40, 36.48, 40.64, 46.53), "whole_memory", "zero"),
    PaperRow("memory of another conversation", (), "whole_foreign", "foreign", "a control, not in the paper"),
    PaperRow("best constant answer", (), "constant", None, "a control, not in the paper"),
)
"""The rows for Qwen3-4B-Instruct, and the controls."""

RECOVERY_ROWS: tuple[PaperRow, ...] = (
    PaperRow("Qwen3-4B-Instruct", (None, 0.08, None, None, None, 6.89), "bare", None),
    PaperRow("delta-mem, token writing", (None, 6.48, None, None, None, 9.62), "memory", None),
    PaperRow("empty memory", (), "zero", None, "a control, not in the paper"),
    PaperRow("memory of another conversation", (), "foreign", None, "a control, not in the paper"),
)
"""The paper's recovery without context (its figure 2): the conversation is written, and not shown."""

NOTES: tuple[str, ...] = (
    "HotpotQA: 300 questions with their ten paragraphs, told one a message; the paper asks its whole dev set.",
    "LoCoMo: categories 1 to 4 without the 99 questions whose answer is known to be wrong; the paper asks all 1,540.",
    "MemoryAgentBench: all questions count alike, and those that need a judge or a list of films are left out; the "
    "paper weights its four parts 2,000, 700, 171 and 800.",
    "TTL: without MemoryAgentBench's own files, two of its five sets, told in conversations of 32 examples; those "
    "figures do not compare with the paper's, only arms with each other.",
    "IFEval and GPQA have no conversation: delta-mem's row is a memory that starts empty; the control's is full of "
    "other talk.",
    "With an empty memory nothing is corrected, so the model's own row is the zero control of prompts that show the "
    "conversation.",
)
"""Where what is measured differs from what the paper measured."""


def suite_tasks(name: str, data_dirs: Sequence[Path]) -> tuple[str, ...]:
    """The tasks of a suite whose data is there.

    Raises:
        ConfigError: there is no such suite, or no directory is given.
        DataError: no directory has the data of any of its tasks.
    """
    if name != "paper":
        raise ConfigError(f"suites are paper; found {name!r}")
    if not data_dirs:
        raise ConfigError("the suite paper reads the folders of its tasks in a data directory; name it (--data-dir)")
    tasks = [benchmark.task for benchmark in BENCHMARKS]
    found = tuple(task for task in tasks if any((place / FOLDERS[task]).is_dir() for place in data_dirs))
    if not found:
        places = ", ".join(str(place) for place in data_dirs)
        raise DataError(
            f"the suite paper reads some of the folders {', '.join(FOLDERS[task] for task in tasks)}; found none of "
            f"them in {places}; see docs/howto/evaluate"
        )
    return found


def suite_table(results: Mapping[str, Any] | None = None) -> str:
    """The paper's figures beside the measured ones, as Markdown; without results what to do for each.

    Args:
        results: of `agentmem.evaluation.comparison.run_comparison`.
    """
    tasks = {} if results is None else {task["task"]: task for task in results["tasks"]}
    measured = PAPER_MODEL if results is None else results["model"]
    lines = [
        f"In percent; the paper's figure for Qwen3-4B-Instruct first, then what was measured of {measured} (with the "
        "95 % interval over conversations), or what that takes.",
        "",
        *_table(PAPER_ROWS, BENCHMARKS, tasks),
        "",
        "Recovery without context: the conversation is written and not shown.",
        "",
        *_table(RECOVERY_ROWS, [each for each in BENCHMARKS if each.task in ("hotpotqa", "locomo")], tasks),
        "",
        *(f"- {note}" for note in NOTES),
    ]
    return "\n".join(lines)


def _table(rows: Sequence[PaperRow], columns: Sequence[Benchmark], tasks: Mapping[str, Any]) -> list[str]:
    heads = [head for column in columns for head in (f"{column.title}: paper", "measured")]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        title = f"{row.title} ({row.note})" if row.note else row.title
        cells = [cell for column in columns for cell in (_figure(row, column), _measured(row, column, tasks))]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _figure(row: PaperRow, column: Benchmark) -> str:
    figure = row.figures[BENCHMARKS.index(column)] if row.figures else None
    return "" if figure is None else f"{figure:.2f}"


def _measured(row: PaperRow, column: Benchmark, tasks: Mapping[str, Any]) -> str:
    arm = row.arm(column)
    if arm is None:
        return ""
    if arm in COMPRESSED and not tasks:
        return "weights not at hand"
    task, kind = column.part or ("", "")
    if task in tasks and kind in tasks[task]["kinds"]:
        arms = tasks[task]["kinds"][kind]
    elif column.task in tasks:
        arms = tasks[column.task]["arms"]
    else:
        return column.needed
    if (of_arm := arms.get(arm)) is None:
        needs = "its weights (`--llmlingua`)" if arm in COMPRESSED else "a LoRA (`--static`)" if arm in STATIC else ""
        return f"`--arms {arm}`" + (f" and {needs}" if needs else "")
    value = of_arm["scores"][column.score] if column.score else {"value": of_arm["share"], **of_arm}
    return f"{100 * value['value']:.2f} ({100 * value['low']:.1f}-{100 * value['high']:.1f})"
