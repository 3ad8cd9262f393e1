"""Adds text to the leading system message: a system prompt, numbered facts, other context.

System messages are shown and never written, so such text stays out of the memory and may change every turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage


def numbered_facts(documents: Sequence[Document]) -> str:
    """The documents' texts as numbered facts: "Facts:", then a line "text [1]" for each; "" if there are none.

    Each text takes one line, and the last number in the line is its own, so that no text can pass for another fact.
    """
    lines = [f"{_one_line(d.page_content)} [{n}]" for n, d in enumerate(documents, start=1)]
    return "\n".join(["Facts:", *lines]) if lines else ""


def facts_metadata(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """The facts that were shown, for the reply's metadata: number, id, source and score, in order of the numbers.

    Their texts are not copied, so that deleting a fact really deletes it.
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
    """`messages` with text that one call shows and no memory keeps: the time, search results, who is asking.

    The text is added at the end of the leading system message. Added to a question instead, it would make the question
    a different message in the next turn, and the memory would consume both.
    """
    return with_leading_text(messages, "", context)


def with_leading_text(messages: Sequence[BaseMessage], before: str, after: str) -> list[BaseMessage]:
    """`messages` with one leading system message: `before`, then the present one's text, then `after`.

    Most chat templates accept only one system message, at the start. Empty texts add nothing.
    """
    if not before and not after:
        return list(messages)
    head = messages[0] if messages and isinstance(messages[0], SystemMessage) else None
    parts = [part for part in (before, head.text if head else "", after) if part]
    rest = list(messages[1:] if head else messages)
    return [SystemMessage("\n\n".join(parts)), *rest]


def question(messages: Sequence[BaseMessage]) -> str:
    """The text to look up facts for: that of the last human message, or ""."""
    return next((m.text for m in reversed(messages) if isinstance(m, HumanMessage)), "")


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
