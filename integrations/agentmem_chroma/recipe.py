"""Shows retrieved facts to a model, and finds the facts that its reply cites.

Facts are in the leading system message, each followed by its number, from 1 on; the reply cites them as [1]. System
messages are shown to the model and never written into its memory, so facts stay out of the matrices and can change
every turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage

# Fenced blocks and inline code, where [1] is an index and not a citation. An unclosed fence extends to the end.
_CODE = re.compile(r"``.*?(?:``|\Z)|`[^`\n]*`", re.DOTALL)
_CITATION = re.compile(r"\[([0-9]{1,6}(?:\s*,\s*[0-9]{1,6})*)\]")


def facts_block(documents: Sequence[Document]) -> str:
    """The documents' texts as numbered facts, or "" if there are no documents.

    `"Facts:\\nfirst text [1]\\nsecond text [2]"`. Each text takes one line: line breaks inside it become spaces. The
    last number in a line is the fact's own, so that no text can pass for another fact. The number comes after the text,
    where a reply puts a citation, so that a small model that copies a fact has also cited it.
    """
    if not documents:
        return ""
    lines = [f"{_one_line(document.page_content)} [{number}]" for number, document in enumerate(documents, start=1)]
    return "\n".join(["Facts:", *lines])


def cited(reply: str | BaseMessage, documents: Sequence[Document]) -> list[Document]:
    """The documents whose numbers the reply cites, each once, in the order of their first citation.

    `[2]`, `[1][3]` and `[1, 3]` are citations. Numbers in code spans and fenced code are not, and a number without a
    document is ignored.

    Args:
        reply: the model's text or message.
        documents: the documents in the order in which `facts_block` numbered them.
    """
    text = reply if isinstance(reply, str) else reply.text
    numbers = [int(number) for group in _CITATION.findall(_CODE.sub(" ", text)) for number in group.split(",")]
    return [documents[n - 1] for n in dict.fromkeys(numbers) if 1 <= n <= len(documents)]


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
