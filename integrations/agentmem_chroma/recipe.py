"""Shows retrieved facts to a model, and finds the facts that its reply cites.

Facts are in the leading system message, each followed by its number, from 1 on; the reply cites them as [1]. System
messages are shown to the model and never written into its memory, so facts stay out of the matrices and can change
every turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage

from agentmem.errors import FactStoreError
from agentmem_chroma.facts import to_document
from agentmem_chroma.store import FactStore

# Fenced blocks and inline code, where [1] is an index and not a citation. An unclosed fence extends to the end.
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_CITATION = re.compile(r"\[([0-9]{1,6}(?:\s*,\s*[0-9]{1,6})*)\]")


def facts_block(documents: Sequence[Document]) -> str:
    """The documents' texts as numbered facts, or "" if there are no documents.

    `"Facts:\\nfirst text [1]\\nsecond text [2]"`. Each text takes one line: line breaks inside it become spaces. The
    last number in a line is the fact's own, so that no text can pass for another fact. The number comes after the text,
    where a reply puts a citation, so that a small model that copies a fact has also cited it.

    Raises:
        FactStoreError: something else than documents.
    """
    if not documents:
        return ""
    for document in documents:
        if not isinstance(document, Document):
            raise FactStoreError(
                f"facts_block takes the documents of a FactRetriever, got {type(document).__name__}; Document(text) "
                "makes one"
            )
    lines = [f"{_one_line(document.page_content)} [{number}]" for number, document in enumerate(documents, start=1)]
    return "\n".join(["Facts:", *lines])


def cited(reply: str | BaseMessage, facts: Sequence[Document] | FactStore | None = None) -> list[Document]:
    """The documents whose numbers the reply cites, each once, in the order of their first citation.

    `[2]`, `[1][3]` and `[1, 3]` are citations. Numbers in code spans and fenced code are not, and a number without a
    document is ignored.

    Args:
        reply: the model's text or message.
        facts: the documents in the order in which `facts_block` numbered them, or the store that they came from: the
            metadata of a stored reply says which of its facts were shown, so this works after a restart. None: the
            documents as far as that metadata goes, with id, source and score but no text. A fact that has been deleted
            from the store comes back in the same way.

    Raises:
        FactStoreError: the reply is neither a text nor a message; or no documents are given, and the reply is a text,
            or its metadata does not say what was shown.
    """
    if not isinstance(reply, str | BaseMessage):
        raise FactStoreError(f"a reply is a text or a message, got {type(reply).__name__}")
    text = reply if isinstance(reply, str) else reply.text
    groups = _CITATION.findall(_CODE.sub(" ", text))
    numbers = dict.fromkeys(int(number) for group in groups for number in group.split(","))
    if facts is None or isinstance(facts, FactStore):
        shown = _shown_facts(reply, facts, numbers.keys())
    else:
        shown = dict(enumerate(facts, start=1))
    return [shown[number] for number in numbers if number in shown]


def _shown_facts(reply: str | BaseMessage, store: FactStore | None, numbers: Collection[int]) -> dict[int, Document]:
    """The facts of these numbers that a reply's metadata names, with their texts where a store still has them."""
    noted: Any = [] if isinstance(reply, str) else reply.response_metadata.get("facts", [])
    if isinstance(reply, str) or not isinstance(noted, list) or not all(map(_is_note, noted)):
        raise FactStoreError(
            "without the documents that were shown, cited takes a reply of MemoryNode(..., retriever=...), whose "
            f"metadata names them; found {noted if noted else type(reply).__name__!r}; pass the documents"
        )
    wanted = {note["number"]: note for note in noted if note["number"] in numbers}
    ids = [note["id"] for note in wanted.values() if note["id"] is not None]
    kept = {fact.id: fact for fact in store.get(ids)} if store is not None and ids else {}
    documents = {}
    for number, note in wanted.items():
        if (fact := kept.get(note["id"])) is not None:
            documents[number] = to_document(fact, note.get("score"))
        else:
            metadata = {"source": note.get("source"), "score": note.get("score")}
            documents[number] = Document("", id=note["id"], metadata=metadata)
    return documents


def _is_note(note: object) -> bool:
    return (
        isinstance(note, Mapping) and isinstance(note.get("number"), int) and isinstance(note.get("id", 0), str | None)
    )


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
