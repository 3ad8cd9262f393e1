"""Small folders in the form of the data that the tasks of `agentmem evaluate` read."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

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


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def save_longmemeval(directory: Path) -> None:
    """`longmemeval/`: four questions, of which one has a long answer and one none; two share a session."""

    def row(name: str, question: str, answer: Any, *sessions: str) -> dict[str, Any]:
        texts = [[{"role": "user", "content": f"It was {text}."}, {"role": "assistant", "content": "I see."}]
                 for text in sessions]  # fmt: skip
        dates = [f"2023/05/{20 - place} (Sat) 02:21" for place in range(len(sessions))]
        return {
            "question_id": name,
            "question_type": "multi-session",
            "question": question,
            "answer": answer,
            "question_date": "2023/05/30 (Tue) 10:00",
            "haystack_dates": dates,
            "haystack_session_ids": list(sessions),
            "haystack_sessions": texts,
        }

    rows = [
        row("a", "How many cats have I?", 2, "a cat", "another cat"),
        row("b", "Where do I live?", "in the old mill", "the mill"),
        row("c", "Which cat came first?", "Mia", "a cat"),
        row("d", "What do I like?", "The reply should name films of Ozu, and no others.", "Ozu"),
        row("e_abs", "How many dogs have I?", "You never said.", "a cat"),
    ]
    write_json(directory / "longmemeval" / "longmemeval_oracle.json", rows)


def save_locomo(directory: Path) -> None:
    """`locomo/`: two talks with five questions; one is known to have a wrong answer, one is to be declined."""
    session = [
        {"speaker": "Ann", "dia_id": "D1:1", "text": "I ran a race on Sunday."},
        {"speaker": "Bob", "dia_id": "D1:2", "text": "Look at this!", "blip_caption": "a photo of a red kite"},
    ]
    talk = {"speaker_a": "Ann", "speaker_b": "Bob", "session_1_date_time": "1:56 pm on 8 May, 2023"}
    talk |= {"session_1": session, "session_2_date_time": "2:00 pm on 9 May, 2023", "session_2": session[:1]}
    asked = [
        {"question": "What has Ann done?", "answer": "ran, swam", "category": 1},
        {"question": "When did Ann run?", "answer": "7 May 2023", "category": 2},
        {"question": "Would Ann like a kite?", "answer": "Likely yes; it is red", "category": 3},
        {"question": "What is in the photo?", "answer": "a kite", "category": 4},
        {"question": "What did Bob run?", "adversarial_answer": "a race", "category": 5},
    ]
    rows = [
        {"sample_id": "conv-26", "conversation": talk, "qa": asked},
        {"sample_id": "new", "conversation": talk, "qa": asked[1:2]},
    ]
    write_json(directory / "locomo" / "locomo10.json", rows)


def save_hotpotqa(directory: Path) -> None:
    """`hotpotqa/`: a question in each of the three files, in the form of each."""
    folder = directory / "hotpotqa"
    titles, sentences = ["Rokko", "Kobe"], [["Mount Rokko is in Kobe.", " It is green."], ["Kobe is a port."]]
    pairs = [list(pair) for pair in zip(titles, sentences, strict=True)]
    columns = {"title": titles, "sentences": sentences}
    row = {"question": "Is Rokko by a port?", "answer": "yes", "type": "comparison", "context": pairs}
    bridge = row | {"question": "Which port is by Rokko?", "answer": "the city of Kobe", "type": "bridge"}
    write_json(folder / "hipporag_train_100.json", [row])
    write_json(folder / "meve_dev_100.json", [bridge | {"context": columns}])
    write_lines(folder / "amor_dev.jsonl", [bridge | {"question": "What is green?", "answer": "Rokko"}])


def save_ttl(directory: Path) -> None:
    """`mab_ttl/`: nine intents with five examples each, and one of each to ask for."""
    folder = directory / "mab_ttl"
    rows = [(f"example {n} of intent {label}", f"intent {label}") for label in range(9) for n in range(5)]
    test = [(f"a new one of intent {label}", f"intent {label}") for label in range(9)]
    write_json(folder / "clinc150_data_full.json", {"train": rows, "test": test})
    for name, part in (("train", rows), ("test", test)):
        with (folder / f"banking77_{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "category"), *part])


MAB_ROWS: dict[str, list[dict[str, Any]]] = {
    "Accurate_Retrieval": [
        {
            "context": "Document 1:\nRokko is a mountain.\n\nDocument 2:\nKobe is the port below Rokko.",
            "questions": ["Which port is below Rokko?", "What is Rokko?"],
            "answers": [["Kobe", "the port of Kobe"], ["a mountain"]],
            "metadata": {"source": "ruler_qa1_197K", "demo": None, "qa_pair_ids": ["ruler_1", "ruler_2"]},
        },
        {
            "context": "User: My cat is called Mia.",
            "questions": ["What is my cat called?", "What do I like?"],
            "answers": [["Mia"], ["The reply should name films of Ozu, and no others."]],
            "metadata": {"source": "longmemeval_s*", "question_types": ["single-session-user"] * 2},
        },
    ],
    "Test_Time_Learning": [
        {
            "context": "Where is my card?\nlabel: 11\nI lost my card.\nlabel: 12",
            "questions": ["Has my card been sent?"],
            "answers": [["11"]],
            "metadata": {"source": "icl_banking77_5900shot_balance"},
        },
        {
            "context": "I like Aurora.",
            "questions": ["Which film is next?"],
            "answers": [["7", "9"]],
            "metadata": {"source": "recsys_redial_full"},
        },
    ],
    "Conflict_Resolution": [
        {
            "context": "0. Mia lives in Lima.\n1. Mia lives in Oslo.",
            "questions": ["Where does Mia live?"],
            "answers": [["Oslo"]],
            "metadata": {"source": "factconsolidation_sh_6k"},
        }
    ],
}
"""Rows in the form of ai-hyz/MemoryAgentBench, by split."""


def save_memoryagentbench(directory: Path) -> None:
    """`memoryagentbench/`: three of its splits, two as Parquet files (as a download of its hub page), one as JSONL."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = directory / "memoryagentbench"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, rows in MAB_ROWS.items():
        if split == "Conflict_Resolution":
            write_lines(folder / f"{split}.jsonl", rows)
        else:
            table = pyarrow.Table.from_pylist(rows)
            parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")


def save_gpqa(directory: Path) -> None:
    """`gpqa/`: two questions with four choices."""
    heads = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    rows = [("Which is heavy?", "lead", "cork", "foam", "air"), ("Which is light?", "air", "lead", "gold", "iron")]
    (directory / "gpqa").mkdir(parents=True, exist_ok=True)
    with (directory / "gpqa" / "gpqa_diamond.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([heads, *rows])
