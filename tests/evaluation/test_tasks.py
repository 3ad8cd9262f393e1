"""The tasks: what they ask of small files in the form of their data, how replies are scored, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agentmem import Message
from agentmem.errors import ConfigError, DataError
from agentmem.evaluation.agent_bench import pieces
from agentmem.evaluation.lessons import EXAMPLES, LABELS
from agentmem.evaluation.task import Task
from agentmem.evaluation.tasks import TASKS, bfcl_accepts, open_task
from agentmem.training.judging import judge
from tests.helpers.task_data import (
    BOOKINGS,
    PROMPTS,
    save_bfcl,
    save_gpqa,
    save_hotpotqa,
    save_ifeval,
    save_locomo,
    save_longmemeval,
    save_memoryagentbench,
    save_sgd,
    save_ttl,
    write_json,
    write_lines,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for save in (save_sgd, save_bfcl, save_ifeval, save_longmemeval, save_locomo, save_hotpotqa, save_ttl):
        save(tmp_path)
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


def test_gpqa_wants_one_letter(tmp_path: Path) -> None:
    save_gpqa(tmp_path)
    task = open_task("gpqa", [tmp_path])
    assert len(task.probes) == 2
    for number, probe in enumerate(task.probes):
        question = probe.ask.messages[0].content
        word = "lead" if "heavy" in question else "air"
        letter = next(line[1] for line in question.splitlines() if line == f"({line[1:2]}) {word}")
        other = next(each for each in "ABCD" if each != letter)
        assert right(task, number, letter)
        assert right(task, number, f"The answer is ({letter}).")
        assert not right(task, number, other)
        assert not right(task, number, f"{letter} or {other}")
        assert not right(task, number, word)
        assert len(probe.told) >= 24
    again = open_task("gpqa", [tmp_path])
    assert [probe.ask.messages for probe in task.probes] == [probe.ask.messages for probe in again.probes]
    (tmp_path / "gpqa" / "gpqa_diamond.csv").write_text("Question,Answer\nWhat?,This\n", "utf-8")
    with pytest.raises(DataError, match="has the columns Question, Correct Answer"):
        open_task("gpqa", [tmp_path])


def asked(task: Task) -> dict[str, int]:
    return {probe.ask.messages[-1].content: number for number, probe in enumerate(task.probes)}


def test_longmemeval_asks_what_has_a_short_answer(data: Path) -> None:
    task = open_task("longmemeval", [data])
    number = asked(task)
    cats = number["How many cats have I? (Today is 2023/05/30.) Answer in a few words."]
    first = number["Which cat came first? (Today is 2023/05/30.) Answer in a few words."]
    mill = number["Where do I live? (Today is 2023/05/30.) Answer in a few words."]
    assert [message.content for message in task.probes[cats].told] == [
        "[2023/05/19] It was another cat.",
        "I see.",
        "[2023/05/20] It was a cat.",
        "I see.",
    ], "sessions come by their dates"
    assert task.probes[cats].cluster == task.probes[first].cluster != task.probes[mill].cluster
    assert right(task, cats, "You have two cats.")
    assert not right(task, cats, "Perhaps 2, perhaps 3.")
    assert sorted(task.skipped.values()) == [1, 1]
    assert task.scores == {}


def test_locomo_leaves_out_what_is_known_to_be_wrong(data: Path) -> None:
    task = open_task("locomo", [data])
    number = asked(task)
    first = [probe for probe in task.probes if probe.conversation == 0]
    assert [probe.conversation for probe in task.probes[:3]] == [0, 1, 0]
    assert sorted(probe.ask.kind for probe in first) == ["multi-hop", "single-hop", "temporal"]
    assert task.skipped == {
        "a wrong answer: not in the talk (errata)": 1,  # the third question of conv-26
        "a question to decline (who always declines is always right)": 1,
    }
    kite = number["What is in the photo? Answer with a short phrase."]
    assert [(message.role, message.content) for message in task.probes[kite].told][:2] == [
        ("user", "[8 May, 2023] Ann: I ran a race on Sunday."),
        ("assistant", "[8 May, 2023] Bob: Look at this! (shares a photo of a red kite)"),
    ]
    assert len(task.probes[kite].told) == 3
    assert right(task, kite, "A red kite.")
    done = number["What has Ann done? Answer with a short phrase."]
    assert right(task, done, "She swam and ran.")
    assert not right(task, done, "She ran.")
    (score,) = task.scores.values()
    assert score(task.probes[done].ask, "tennis, ran") == 0.5  # one of the two
    assert score(task.probes[kite].ask, "kites") == 1


def test_hotpotqa_tells_paragraphs_and_asks(data: Path) -> None:
    task = open_task("hotpotqa", [data])
    number = asked(task)
    port, closed = (
        number[f"{text} Answer in a few words."] for text in ("Which port is by Rokko?", "Is Rokko by a port?")
    )
    assert len(task.probes) == len({probe.conversation for probe in task.probes}) == 3
    assert {probe.told for probe in task.probes} == {
        (Message("user", "Rokko: Mount Rokko is in Kobe. It is green."), Message("user", "Kobe: Kobe is a port."))
    }
    assert right(task, port, "It is the city of Kobe.")
    assert right(task, closed, "Yes, by Kobe.")
    assert not right(task, closed, "No. Well, yes.")
    exact, f1 = (task.scores[name] for name in ("exact match", "HotpotQA F1"))
    assert (exact(task.probes[port].ask, "City of Kobe!"), exact(task.probes[port].ask, "Kobe")) == (1, 0)
    assert f1(task.probes[port].ask, "Kobe") == 0.5
    assert f1(task.probes[closed].ask, "yes it is") == 0


def test_ttl_teaches_labels_that_nothing_else_tells(data: Path) -> None:
    task = open_task("ttl", [data])
    first, second = ([probe for probe in task.probes if probe.conversation == number] for number in (0, 1))
    assert ({probe.ask.kind for probe in first}, {probe.ask.kind for probe in second}) == ({"banking77"}, {"clinc150"})
    assert len(first) == LABELS
    assert len(first[0].told) == LABELS * EXAMPLES
    labels = {line.split("label: ")[1] for line in (message.content for message in first[0].told)}
    assert labels != {line.split("label: ")[1] for line in (message.content for message in second[0].told)}
    for number, probe in enumerate(task.probes[:LABELS]):
        (label,) = probe.ask.values
        intent = probe.ask.messages[0].content.split("\n")[0].removeprefix("a new one of ")
        assert any(m.content.endswith(f"of {intent}\nlabel: {label}") for m in probe.told)
        assert right(task, number, f"{label}.")
        assert not right(task, number, " ".join(sorted(labels)))
    assert open_task("ttl", [data]).probes == task.probes
    assert open_task("ttl", [data], seed=5).probes != task.probes


CAT = [{"role": "user", "content": "My cat is called Mia."}, {"role": "assistant", "content": "Noted."}]
PLACE = [{"role": "user", "content": "I live in New York City."}]


def test_hotpotqa_takes_the_whole_dev_set_where_it_is_there(data: Path) -> None:
    few = open_task("hotpotqa", [data])
    row = json.loads((data / "hotpotqa" / "hipporag_train_100.json").read_text("utf-8"))[0]
    official = row | {"_id": "5a8b57f2", "level": "hard", "supporting_facts": [["Rokko", 0]], "question": "Where?"}
    write_json(data / "hotpotqa" / "hotpot_dev_distractor_v1.json", [official])
    whole = open_task("hotpotqa", [data])
    assert len(few.probes) == 3
    assert [probe.ask.messages[0].content for probe in whole.probes] == ["Where? Answer in a few words."]
    assert whole.probes[0].told == next(p.told for p in few.probes if p.ask.reply.content == "yes")


def test_ifeval_takes_the_file_of_its_hub_page(data: Path) -> None:
    (data / "ifeval" / "input_data.jsonl").rename(data / "ifeval" / "ifeval_input_data.jsonl")
    assert open_task("ifeval", [data]).files[0].path.name == "ifeval_input_data.jsonl"


def test_memoryagentbench_reads_the_files_of_its_hub_page(tmp_path: Path) -> None:
    save_memoryagentbench(tmp_path)
    task = open_task("memoryagentbench", [tmp_path])
    assert {file.path.name for file in task.files} == {
        "Accurate_Retrieval-00000-of-00001.parquet",
        "Test_Time_Learning-00000-of-00001.parquet",
        "Conflict_Resolution.jsonl",
    }
    assert task.kinds == ("accurate retrieval", "test-time learning", "conflict resolution")
    asked = {probe.ask.reply.content: probe for probe in task.probes}
    assert set(asked) == {"Kobe", "a mountain", "Mia", "11", "Oslo"}
    assert asked["Kobe"].conversation == asked["a mountain"].conversation != asked["Mia"].conversation
    assert asked["11"].told == (Message("user", "Where is my card?\nlabel: 11\nI lost my card.\nlabel: 12"),)
    assert sorted(task.skipped) == [
        "a recommendation, scored by its place in a list of films (not read)",
        "an answer of LongMemEval of more than 40 characters (needs a judge)",
    ]
    (score,) = task.scores.values()
    for answer, reply, is_right, matched in (
        ("Kobe", "It is the port of Kobe.", True, 1.0),
        ("Kobe", "Osaka", False, 0.0),
        ("a mountain", "Mountain.", False, 1.0),  # their match leaves articles out
        ("11", "11", True, 1.0),
        ("11", "label: 11", True, 0.0),
        ("11", "11 or 12", False, 0.0),
        ("Oslo", "In Oslo, not in Lima", True, 1.0),
    ):
        number = task.probes.index(asked[answer])
        assert right(task, number, reply) is is_right, (answer, reply)
        assert score(asked[answer].ask, reply) == matched, (answer, reply)


def test_a_context_is_told_in_pieces_of_whole_lines() -> None:
    text = "One.\nTwo. Two more.\n" + "A long line. " * 30
    cut = pieces(text, most=60)
    assert all(len(piece) <= 60 for piece in cut)
    assert cut[0] == "One.\nTwo. Two more."
    assert " ".join(cut).split() == text.split()


def test_memoryagentbench_says_what_it_reads(tmp_path: Path) -> None:
    (tmp_path / "memoryagentbench").mkdir()
    with pytest.raises(DataError, match=r"SPLIT-\*\.parquet .*found none; fetch ai-hyz/MemoryAgentBench"):
        open_task("memoryagentbench", [tmp_path])
    (tmp_path / "memoryagentbench" / "Test_Time_Learning-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is a Parquet file; found another form"):
        open_task("memoryagentbench", [tmp_path])
    write_lines(tmp_path / "memoryagentbench" / "Accurate_Retrieval.jsonl", [{"context": "a", "questions": ["b"]}])
    (tmp_path / "memoryagentbench" / "Test_Time_Learning-0.parquet").unlink()
    with pytest.raises(DataError, match="has a context, questions"):
        open_task("memoryagentbench", [tmp_path])


def test_own_questions_come_from_a_file(tmp_path: Path) -> None:
    rows: list[object] = [
        {"messages": CAT, "question": "What is my cat called?", "answers": ["Mia", "Mia the cat"], "kind": "names"},
        {
            "messages": PLACE,
            "question": "Where?",
            "answers": ["New York City"],
            "choices": ["New York City", "New York"],
        },
        {"messages": CAT, "question": "Which animal have I?", "answers": ["a cat"]},
    ]
    path = tmp_path / "mine.jsonl"
    write_lines(path, rows * 8 + [{"messages": CAT, "question": "?"}])
    task = open_task("own", [], own_file=path)
    assert [probe.conversation for probe in task.probes[:3]] == [0, 1, 0]
    assert task.skipped == {"a bad line": 1}
    assert task.probes[0].told == (Message("user", "My cat is called Mia."), Message("assistant", "Noted."))
    assert task.probes[1].ask.messages[0].content == "Where?\nAnswer with one of: New York City; New York."
    assert right(task, 0, "It is Mia.")
    assert not right(task, 0, "It is Miami.")
    assert right(task, 1, "In New York City.")
    assert not right(task, 1, "New York City or New York")
    assert not right(task, 1, "New York")
    assert len(open_task("own", [], limit=2, own_file=path).probes) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": []}, r"line 1: `answers` has 1 text or more"),
        ({"answers": "Mia"}, r"`answers` is a list of texts"),
        ({"question": " "}, r"`question` is text"),
        ({"choices": ["Leo"]}, r"each of `answers` is one of `choices`; found 'Mia'"),
        ({"messages": [{"role": "cat", "content": "?"}]}, r"message 1: `role` is one of"),
        ({"answer": "Mia"}, r"unknown key 'answer'; known are messages, question"),
    ],
)
def test_bad_lines_of_own_questions_are_refused_with_the_reason(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "mine.jsonl"
    write_lines(path, [{"messages": CAT, "question": "What is my cat called?", "answers": ["Mia"]} | change])
    with pytest.raises(DataError, match=message):
        open_task("own", [], own_file=path)


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
        (
            "longmemeval",
            rewrite("longmemeval/longmemeval_oracle.json", {"answer": 1}),
            r"haystack_sessions and their ids",
        ),
        ("locomo", rewrite("locomo/locomo10.json", {"sample_id": "x", "qa": []}), r"has conversation and qa; found"),
        ("hotpotqa", rewrite("hotpotqa/amor_dev.jsonl", {"question": "?"}), r"has question, answer, type and context"),
        ("ttl", rewrite("mab_ttl/banking77_test.csv", "x", "y"), r"has the columns text and category"),
        ("ttl", rewrite("mab_ttl/clinc150_data_full.json", {"train": []}), r"lists of \[text, label\]"),
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
    with pytest.raises(ConfigError, match="--data"):
        open_task("own", [data])
    histories = {"longmemeval", "longmemeval-judge", "locomo"}
    lessons = {"hotpotqa", "ttl", "memoryagentbench"}
    assert set(TASKS) == histories | lessons | {"sgd", "bfcl-memory", "ifeval", "gpqa", "own"}
