"""Shows text to a model in the leading system message: a system prompt, retrieved facts with numbers, other context.

System messages are shown and never written, so such text stays out of the memory and may change every turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage


def numbered_facts(documents: Sequence[Document]) -> str:
    """The documents' texts as numbered facts: "Facts:", then a line "text [1]" for each; "" for none.

    A text takes one line and the last number of a line is its own, so that no text can pretend to be another number.
    """
    lines = [f"{_one_line(d.page_content)} [{n}]" for n, d in enumerate(documents, start=1)]
    return "\n".join(["Facts:", *lines]) if lines else ""


def facts_metadata(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """What a reply's metadata says of the facts that were shown: number, id, source and score, in the order of numbers.

    Their texts stay where they are kept, so that a fact that is deleted is deleted.
    """
    return [
        {
            "number": number,
            "id": document.id,
            "source": document.metadata.get("source"),
            "score": document.metadata.get("score"),
        }
        for number, document in enumerate(documents, start=1)
    ]


def with_context(messages: Sequence[BaseMessage], context: str) -> list[BaseMessage]:
    """`messages` with text that one call shows and no memory keeps: the time, what was looked up, who is asking.

    The text goes to the end of the leading system message. Put around a question instead, it would make the question
    another message at the next turn, and the memory would have both.
    """
    return with_leading_text(messages, "", context)


def with_leading_text(messages: Sequence[BaseMessage], before: str, after: str) -> list[BaseMessage]:
    """`messages` with one leading system message: `before`, what a leading one says already, `after`.

    Most chat templates take a single system message, and only in front. Empty texts add nothing.
    """
    if not before and not after:
        return list(messages)
    head = messages[0] if messages and isinstance(messages[0], SystemMessage) else None
    parts = [part for part in (before, head.text if head else "", after) if part]
    rest = list(messages[1:] if head else messages)
    return [SystemMessage("\n\n".join(parts)), *rest]


def question(messages: Sequence[BaseMessage]) -> str:
    """What to look up facts for: the text of the last human message, or ""."""
    return next((m.text for m in reversed(messages) if isinstance(m, HumanMessage)), "")


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
