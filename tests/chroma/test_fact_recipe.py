"""The prompt recipe: numbered facts in, citations out."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage

from agentmem_chroma import cited, facts_block

DOCUMENTS = [Document(page_content=text) for text in ("first text", "second text", "third text")]


def test_the_block_numbers_its_facts() -> None:
    assert facts_block(DOCUMENTS[:2]) == "Facts:\nfirst text [1]\nsecond text [2]"
    assert facts_block([]) == ""


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "  a\n\n  b\n", "a\u2028b", "a\x0bb"])
def test_a_fact_takes_one_line(text: str) -> None:
    assert facts_block([Document(page_content=text)]) == "Facts:\na b [1]"


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ("The port is 8080 [2].", [2]),
        ("So [3][1], and again [3].", [3, 1]),
        ("Both [1, 3] say so; [2,1] too.", [1, 3, 2]),
        ("Nothing is known.", []),
        ("[0] [4] [-1] [1a] [] [99999999999999999999]", []),
        ("Call `argv[1]` first [2].", [2]),
        ("```python\nx = rows[1]\n```\nas said [3]", [3]),
        ("```\nrows[1]", []),
        ("", []),
    ],
)
def test_what_a_reply_cites(reply: str, numbers: list[int]) -> None:
    assert cited(reply, DOCUMENTS) == [DOCUMENTS[n - 1] for n in numbers]
    assert cited(AIMessage(reply), DOCUMENTS) == cited(reply, DOCUMENTS)
