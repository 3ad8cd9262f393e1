"""The tasks: what they ask of small files in the form of their data, how replies are scored, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agentmem import Message
from agentmem.errors import ConfigError, DataError
from agentmem.evaluation.tasks import TASKS, Task, bfcl_accepts, open_task
from agentmem.training.judging import judge
from tests.helpers.task_data import BOOKINGS, PROMPTS, save_bfcl, save_ifeval, save_sgd, write_lines


@pytest.fixture
def data(tmp_path: Path) -> Path:
    save_sgd(tmp_path)
    save_bfcl(tmp_path)
    save_ifeval(tmp_path)
    return tmp_path


def right(task: Task, number: int, reply: str) -> bool:
    return judge(task.probes[number].ask, Message("assistant", reply), max_words=task.max_words).right


def test_sgd_asks_for_what_the_reply_says_again(data: Path) -> None:
    task = open_task("sgd", [data])
    assert len(task.probes) == 4
    assert len({probe.conversation for probe in task.probes}) == 3
    for number, probe in enumerate(task.probes):
        booking = next(booking for booking in BOOKINGS if booking[0] == probe.told[0].content)
        assert [message.content for message in probe.told] == list(booking[:4])
        assert probe.ask.messages == (Message("user", booking[4]),)
        assert right(task, number, booking[5])
        assert not right(task, number, "Fine, it is done.")
        assert not right(task, number, " ".join([*booking] * 5)), "an echo of everything is too long"
    assert task.licence == "CC-BY-SA-4.0"
    assert {file.path.name for file in task.files} == {"dev.jsonl", "dev.recall.jsonl"}


def test_items_of_one_sgd_dialogue_are_one_cluster(data: Path) -> None:
    booking = (*BOOKINGS[0], "Yes.", "Done: Rokko.")
    turns = [{"speaker": ("USER", "SYSTEM")[n % 2], "utterance": text} for n, text in enumerate(booking)]
    write_lines(data / "sgd" / "dev.jsonl", [{"dialogue_id": "1_0", "turns": turns}])
    item = {"dialogue_id": "1_0", "told": 0, "slot": "city"}
    items = [item | {"said_again": 5, "value": "Albany"}, item | {"said_again": 7, "value": "Rokko"}]
    write_lines(data / "sgd" / "dev.recall.jsonl", items)
    probes = open_task("sgd", [data]).probes
    assert len({probe.conversation for probe in probes}) == 2
    assert len({probe.cluster for probe in probes}) == 1


def test_bfcl_asks_about_the_conversation_of_its_scenario(data: Path) -> None:
    task = open_task("bfcl-memory", [data])
    assert [probe.ask.kind for probe in task.probes] == ["customer", "finance", "healthcare", "student", "customer"]
    assert [message.content for message in task.probes[0].told] == ["My name is Michael.", "I live in Seattle."]
    assert task.probes[0].told == task.probes[4].told
    assert task.probes[0].conversation == task.probes[4].conversation
    assert right(task, 0, "It is michael!")
    assert not right(task, 0, "It is Michaela.")
    assert right(task, 1, "Seven.")
    assert [probe.ask.kind for probe in open_task("bfcl-memory", [data], limit=2).probes] == ["customer", "finance"]


@pytest.mark.parametrize(
    ("accepted", "reply", "there"),
    [
        (["April 1, 2024"], "on april 1 2024", True),
        (["e-sports"], "Esports.", True),
        (["7", "seven"], "It is 17.", False),
        (["7", "seven"], "seven", True),
        (["Losartan 50 mg"], "You take (losartan) 50 mg.", True),
        (["steam wand"], "the wand", False),
    ],
)
def test_bfcl_compares_without_signs_and_case(accepted: list[str], reply: str, there: bool) -> None:
    assert bfcl_accepts(accepted, reply) is there


def test_ifeval_is_checked_by_its_own_program(data: Path) -> None:
    task = open_task("ifeval", [data])
    left_out = sum(task.skipped.values())  # one, where NLTK's punkt_tab is not to be had
    assert len(task.probes) + left_out == len(PROMPTS)
    number = {probe.ask.messages[0].content: n for n, probe in enumerate(task.probes)}
    commas, lower = number[PROMPTS[0][0]], number[PROMPTS[1][0]]
    assert right(task, commas, "Rome is old and large. " * 60), "a long reply is no mistake here"
    assert not right(task, commas, "Rome is old, and large.")
    assert right(task, lower, "hello world! here is some rain for everybody.")
    assert not right(task, lower, "hello world! here is some snow for everybody."), "all instructions count"
    assert not right(task, lower, "Hello World! Here is some rain for everybody.")
    assert not right(task, commas, "")
    assert "retrieval" not in task.arms
    told = [probe.told for probe in task.probes]
    assert all(len(messages) >= 24 for messages in told)
    assert told[0] != told[1]
    assert told == [probe.told for probe in open_task("ifeval", [data]).probes]


def cut(path: str) -> Callable[[Path], None]:
    return lambda data: (data / path).unlink()


def rewrite(path: str, *rows: object) -> Callable[[Path], None]:
    return lambda data: write_lines(data / path, rows)


@pytest.mark.parametrize(
    ("task", "damage", "message"),
    [
        ("sgd", cut("sgd/dev.recall.jsonl"), r"needs dev.recall.jsonl"),
        (
            "sgd",
            rewrite("sgd/dev.recall.jsonl", {"dialogue_id": "1_0"}),
            r"has dialogue_id, told, said_again and value",
        ),
        ("bfcl-memory", cut("bfcl_memory/memory_student.json"), r"cannot read .*memory_student"),
        ("bfcl-memory", rewrite("bfcl_memory/memory_student.json", {"id": 1}), r"\(student\) have `question`"),
        ("bfcl-memory", rewrite("bfcl_memory/answers_BFCL_v4_memory.json", {"id": "other"}), r"an answer with its id"),
        ("bfcl-memory", rewrite("bfcl_memory/BFCL_v4_memory.json", 3), r"one JSON object per line"),
        ("ifeval", rewrite("ifeval/input_data.jsonl", {"prompt": "?"}), r"instruction_id_list and kwargs; found"),
        (
            "ifeval",
            rewrite(
                "ifeval/input_data.jsonl", {"key": 1, "prompt": "?", "instruction_id_list": ["x:y"], "kwargs": [{}]}
            ),
            r"does not know: x:y",
        ),
    ],
)
def test_damaged_data_is_refused(data: Path, task: str, damage: Callable[[Path], None], message: str) -> None:
    damage(data)
    with pytest.raises(DataError, match=message):
        open_task(task, [data])


def test_what_cannot_be_opened_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks are sgd, .*found 'sdg'"):
        open_task("sdg", [data])
    with pytest.raises(ConfigError, match="--data-dir"):
        open_task("sgd", [])
    with pytest.raises(ConfigError, match="1 question or more"):
        open_task("sgd", [data], limit=0)
    with pytest.raises(DataError, match=r"elsewhere/sgd; there is none|elsewhere/sgd, of which there is none"):
        open_task("sgd", [tmp_path / "elsewhere"])
    assert len(open_task("sgd", [tmp_path / "elsewhere", data], limit=1).probes) == 1
    assert set(TASKS) == {"sgd", "bfcl-memory", "ifeval"}
