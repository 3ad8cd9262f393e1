"""How the demo shows its steps: one rich renderable per step, each with a sentence that explains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten

from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from agentmem import MemoryState
from agentmem.nano.recipe.language import Binding
from agentmem.text import printable
from agentmem_cli.scores import NAMES
from agentmem_cli.script import is_right

_LONGEST = 160  # most characters of a reply in a table


@dataclass(frozen=True)
class Row:
    """A question, the correct value, the memory's answer, and the tokens of a prompt that replays everything."""

    question: str
    binding: Binding
    reply: AIMessage
    replayed: int


@dataclass(frozen=True)
class Moment:
    """A point in the thread: its number of messages, and when it was saved."""

    messages: int
    time: str


def conversation(turns: Sequence[tuple[str, AIMessage]], change: str) -> RenderableType:
    """The turns of the thread; the one that changes a fact is marked."""
    table = _table("you", "agent", ("prompt\ntokens", "right"))
    for said, reply in turns:
        you = Text(said, style="bold yellow" if said == change else "")
        table.add_row(you, _said(reply), str(prompt_tokens(reply)))
    return _step(
        table,
        "Every prompt shows the message at hand and nothing else (a window of one message). What the agent is told "
        "is written into the memory as it is read. The marked line changes a fact told before.",
    )


def left_behind(memory: MemoryState, others: int, facts: int) -> RenderableType:
    """What the files hold when the first process ends."""
    return Text.assemble(
        ("Kept: ", "bold"),
        f"a memory of {_size(memory)} that has consumed {memory.count} messages, in the thread's checkpoint; another "
        f"thread, told {others} other things; {facts} exact facts with their sources in Chroma, none of them said "
        "in a thread.\n",
    )


def opened(pid: int, messages: int, memory: MemoryState) -> RenderableType:
    """What the second process finds."""
    return Text.assemble(
        ("Opened: ", "bold"),
        f"process {pid} loaded the model anew and found the thread: {messages} messages, and a memory of "
        f"{_size(memory)}, digest {memory.digest[:12]}. Each question below is a branch of this one checkpoint, so no "
        "answer can lean on another, and its prompt shows the question alone.\n",
    )


def answers(rows: Sequence[Row]) -> RenderableType:
    """The memory's answers, with the size of each prompt compared to replaying the whole conversation."""
    table = _table("question", "answer from memory", "", ("prompt\ntokens", "right"), ("replay\ntokens", "right"))
    for row in rows:
        table.add_row(
            Text(row.question),
            _said(row.reply),
            _mark(is_right(row.reply.text, row.binding)),
            str(prompt_tokens(row.reply)),
            str(row.replayed),
        )
    right = sum(is_right(row.reply.text, row.binding) for row in rows)
    shown, replayed = sum(prompt_tokens(row.reply) for row in rows), sum(row.replayed for row in rows)
    table.add_section()
    table.add_row(Text("all"), Text(f"{right} of {len(rows)} right"), "", str(shown), str(replayed), style="bold")
    return _step(
        table,
        f"The prompts together had {shown} tokens; replaying the conversation for each question would have taken "
        f"{replayed}, {replayed / max(shown, 1):.0f} times as many, and more with every turn.",
    )


def controls(
    rows: Sequence[Row], zeroed: Sequence[AIMessage], foreign: Sequence[AIMessage], elsewhere: Mapping[str, Binding]
) -> RenderableType:
    """The same questions without this memory; values that belong to the other thread are marked as such."""
    table = _table("right answer", NAMES["zeroed"], "", NAMES["foreign"], "")
    for row, without, other in zip(rows, zeroed, foreign, strict=True):
        theirs = is_right(other.text, elsewhere[row.binding.attribute])
        table.add_row(
            Text(f"{row.binding.attribute}: {row.binding.value}"),
            _said(without),
            _hit(is_right(without.text, row.binding)),
            Text.assemble(_said(other), (" (theirs)", "dim") if theirs else ""),
            _hit(is_right(other.text, row.binding)),
        )
    return _step(
        table,
        "Controls: the same model, the same thread, the same questions. Once the matrices are set to zero, once they "
        "are the other thread's, which was told the same things with other values. Right answers would be chance.",
    )


def exact_fact(
    question: str, shown: Sequence[Document], reply: AIMessage, sources: Sequence[str], right: bool
) -> RenderableType:
    """What the store found, and the answer with its citation resolved."""
    table = _table("", "fact in the prompt", "source", ("score", "right"))
    for number, document in enumerate(shown, start=1):
        source, score = document.metadata["source"], document.metadata["score"]
        table.add_row(
            Text(f"[{number}]"), Text(printable(document.page_content)), Text(printable(source)), f"{score:.2f}"
        )
    said = Text.assemble(
        ("you    ", "bold"), question, ("\nagent  ", "bold"), _said(reply), "  ", _mark(right),
        ("\nsource ", "bold"), printable(", ".join(sources)) or "none cited", "\n",
    )  # fmt: skip
    return _step(
        Group(table, said),
        "Exact facts are not the memory's work. Chroma finds what the question is about, the prompt shows it with a "
        "number (never written into the memory), the answer cites the number, and the number leads to the source.",
    )


def rewound(
    change: str, question: str, moments: Sequence[Moment], replies: Sequence[AIMessage], rights: Sequence[bool]
) -> RenderableType:
    """The same question before and after a change."""
    table = _table("checkpoint", "saved", "answer", "")
    for name, moment, reply, right in zip(("before the change", "now"), moments, replies, rights, strict=True):
        when = moment.time[11:19]
        table.add_row(f"{name}, {moment.messages} messages", when, _said(reply), _mark(right))
    return _step(
        table,
        Text.assemble(
            "Time travel: the memory is a value in the checkpoint, so the thread as it was before ",
            (change, "yellow"),
            " still has the memory of that moment. Asked: ",
            (question, "bold"),
        ),
    )


def prompt_tokens(reply: AIMessage) -> int:
    """The number of tokens in the prompt that a reply answered."""
    return reply.usage_metadata["input_tokens"] if reply.usage_metadata else 0


def _table(*columns: str | tuple[str, str]) -> Table:
    """A table with these headers; (header, "right") aligns a column of numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        if isinstance(column, str):
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column[0], justify="right", no_wrap=True)
    return table


def _step(body: RenderableType, said: str | Text) -> RenderableType:
    explained = said if isinstance(said, Text) else Text(said)
    return Group(explained, body)


def _said(reply: AIMessage) -> Text:
    """A reply in one line; a long one is cut for display only."""
    return Text(shorten(printable(reply.text), _LONGEST, placeholder=" …"), style="cyan")


def _mark(right: bool) -> Text:
    return Text("right", style="bold green") if right else Text("wrong", style="bold red")


def _hit(right: bool) -> Text:
    """The mark for a control's answer: a control is supposed to be wrong."""
    return Text("right", style="bold yellow") if right else Text("wrong", style="dim")


def _size(memory: MemoryState) -> str:
    return f"{len(memory.data) / 1000:.1f} kB"
