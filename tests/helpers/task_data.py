"""Small folders in the form of the data that the tasks of `agentmem evaluate` read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BOOKINGS = (
    ("A table in Albany, please.", "Where?", "At Rokko.", "When?", "At two.", "A table at Rokko in Albany at 2 pm?"),
    ("I want a room in Oslo.", "Which hotel?", "The Sage.", "When?", "Today.", "A room at the Sage in Oslo, today?"),
    ("Find me a film in Lima.", "Which one?", "Aurora.", "When?", "At nine.", "Aurora in Lima at nine?"),
)
"""Dialogues whose last reply says again what was told."""
CITIES = ("Albany", "Oslo", "Lima")

_TOLD = {
    "customer": ("My name is Michael.", "I live in Seattle."),
    "finance": ("My handicap is 7.", "I start with the Bloomberg Terminal."),
    "healthcare": ("I take losartan 50 mg.",),
    "notetaker": ("Monday: the team meeting ran over by 30 minutes.",),
    "student": ("My cat is called Mia.",),
}
_ASKED = (
    ("customer", "What is my first name?", ["Michael"]),
    ("customer", "Where do I live?", ["Seattle"]),
    ("finance", "What is my handicap?", ["7", "seven"]),
    ("healthcare", "Which medicine do I take, and how much?", ["Losartan 50 mg"]),
    ("student", "What is my cat called?", ["Mia"]),
)
PROMPTS: tuple[tuple[str, tuple[str, ...], tuple[dict[str, Any], ...]], ...] = (
    ("Tell me about Rome without commas.", ("punctuation:no_comma",), ({},)),
    (
        "Say hello to the world in lowercase, and use the word rain.",
        ("change_case:english_lowercase", "keywords:existence"),
        ({}, {"keywords": ["rain"]}),
    ),
    (
        "Describe a dog in at least 3 sentences.",
        ("length_constraints:number_sentences",),
        ({"relation": "at least", "num_sentences": 3},),
    ),
)


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write a JSONL file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def save_sgd(directory: Path) -> None:
    """`sgd/`: three dialogues of dev, with an item each, and one item more of the first."""
    dialogues = [
        {
            "dialogue_id": f"1_{number}",
            "turns": [{"speaker": ("USER", "SYSTEM")[n % 2], "utterance": text} for n, text in enumerate(booking)],
        }
        for number, booking in enumerate(BOOKINGS)
    ]
    items = [
        {"dialogue_id": f"1_{number}", "told": 0, "said_again": 5, "slot": "city", "value": city}
        for number, city in enumerate(CITIES)
    ]
    items.append(items[0] | {"value": "Rokko"})
    write_lines(directory / "sgd" / "dev.jsonl", dialogues)
    write_lines(directory / "sgd" / "dev.recall.jsonl", items)


def save_bfcl(directory: Path) -> None:
    """`bfcl_memory/`: five conversations, and five questions about four of them."""
    folder = directory / "bfcl_memory"
    for scenario, texts in _TOLD.items():
        turns = [[{"role": "user", "content": text}] for text in texts]
        write_lines(folder / f"memory_{scenario}.json", [{"question": turns, "scenario": scenario}])
    rows = [
        {"id": f"memory_{n}", "question": [[{"role": "user", "content": text}]], "scenario": scenario}
        for n, (scenario, text, _) in enumerate(_ASKED)
    ]
    write_lines(folder / "BFCL_v4_memory.json", rows)
    answers = [{"id": f"memory_{n}", "ground_truth": accepted} for n, (_, _, accepted) in enumerate(_ASKED)]
    write_lines(folder / "answers_BFCL_v4_memory.json", answers)


def save_ifeval(directory: Path) -> None:
    """`ifeval/`: three prompts, the last of which NLTK's punkt_tab is needed for."""
    rows = [
        {"key": 1000 + n, "prompt": text, "instruction_id_list": kinds, "kwargs": given}
        for n, (text, kinds, given) in enumerate(PROMPTS)
    ]
    write_lines(directory / "ifeval" / "input_data.jsonl", rows)
