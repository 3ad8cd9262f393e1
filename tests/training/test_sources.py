"""Sources: a number always gives the same conversation; what is held out; mixtures by shares; the public data sets."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import ConfigError, DataError
from agentmem.training.conversations import Conversation
from agentmem.training.episodes import EpisodeConfig
from agentmem.training.facts.splits import split_of
from agentmem.training.facts.values import Vocabulary
from agentmem.training.sources import ENDLESS, MixedSource, Source, SourceOptions, open_source, open_sources


def texts(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def save(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(content.encode()) if path.suffix == ".xz" else content.encode())


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def talk(number: int) -> dict[str, Any]:
    roles = ("user", "assistant") * 2
    return {"messages": [{"role": role, "content": f"{role} {number} {n}"} for n, role in enumerate(roles)]}


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    save(path, lines(*map(talk, range(40))))
    return path


# Facts.


def test_facts_never_run_out_and_are_determined_by_the_seed() -> None:
    source = open_source("facts", seed=3)
    assert len(source) == ENDLESS
    assert source.conversation(12) == open_source("facts", seed=3).conversation(12)
    assert source.conversation(12) != open_source("facts", seed=4).conversation(12)
    assert source.conversation(12).origin == "facts:12"
    assert not any(source.conversation(12).train)
    assert source.files == ()


def test_questions_about_facts_become_asks_with_what_judges_them() -> None:
    options = SourceOptions(facts=EpisodeConfig(rules=0.5, changes=0.5), tools=True)
    source = open_source("facts", options=options)
    kinds = Counter[str]()
    for number in range(300):
        conversation = source.conversation(number)
        said = " ".join(text for _, text in texts(conversation))
        for ask in conversation.asks:
            kinds[ask.kind] += 1
            assert (ask.check is not None) == (not ask.values) == (ask.kind in ("never_told", "rule_followed"))
            assert all(value in said for value in ask.values)
            assert not set(ask.forbidden) & set(ask.values)
            if ask.kind == "tool_call":
                (call,) = ask.reply.tool_calls
                assert ask.values[0] in call.arguments.values()
                assert ask.tools[0]["function"]["name"] == call.name
            else:
                assert all(value in ask.reply.content for value in ask.values)
                assert ask.check is None or ask.check(ask.reply.content)
    assert set(kinds) == {"ask", "choice", "never_told", "rule_followed", "tool_call"}


def test_there_are_no_tool_calls_without_tools() -> None:
    options = SourceOptions(facts=EpisodeConfig(acts=(("tool_call", 1.0),)))
    asks = [ask for number in range(50) for ask in open_source("facts", options=options).conversation(number).asks]
    assert asks
    assert not any(ask.tools or ask.reply.tool_calls for ask in asks)


def test_held_out_facts_have_values_that_training_never_sees() -> None:
    options = SourceOptions(facts=EpisodeConfig(kinds=("word", "name"), two_words=0.0), vocabulary=Vocabulary())
    source = open_source("facts", options=options)
    held_out = source.held_out(60)
    assert held_out == open_source("facts", options=options).held_out(60)
    values = {value for conversation in held_out for ask in conversation.asks for value in ask.values}
    assert values
    assert {split_of(value, "value") for value in values} == {"heldout"}
    trained = {v for number in range(200) for ask in source.conversation(number).asks for v in ask.values}
    assert not values & trained


def test_parts_of_facts_can_be_left_in() -> None:
    options = SourceOptions(held_out_parts=())
    source = open_source("facts", options=options)
    values = {value for conversation in source.held_out(50) for ask in conversation.asks for value in ask.values}
    trained = {v for number in range(2000) for ask in source.conversation(number).asks for v in ask.values}
    assert values & trained
    conversations = {tuple(texts(source.conversation(number))) for number in range(2000)}
    assert not conversations & {tuple(texts(conversation)) for conversation in source.held_out(50)}


# Files.


def test_a_file_is_divided_the_same_way_however_it_grows(chats: Path) -> None:
    source = open_source(chats)
    held_out = source.held_out(100)
    assert 0 < len(held_out) < 15
    assert len(source) + len(held_out) == 40
    train = [tuple(texts(source.conversation(number))) for number in range(len(source))]
    assert not set(train) & {tuple(texts(conversation)) for conversation in held_out}
    assert source.files[0].sha256 == hashlib.sha256(chats.read_bytes()).hexdigest()
    save(chats, lines(*map(talk, range(60))))
    grown = [texts(conversation) for conversation in open_source(chats).held_out(100)]
    assert all(texts(conversation) in grown for conversation in held_out)
    assert len(open_source(chats).held_out(2)) == 2


def test_equal_conversations_are_on_one_side_and_small_files_have_both(chats: Path) -> None:
    save(chats, lines(*[talk(0)] * 5, *[talk(1)] * 5))
    source = open_source(chats)
    assert (len(source), len(source.held_out(100))) == (5, 5)
    save(chats, lines(*[talk(0)] * 5))
    assert (len(open_source(chats)), open_source(chats).held_out(3)) == (5, ())
    save(chats, lines(*map(talk, range(40))))
    assert open_source(chats, options=SourceOptions(held_out_share=0.0)).held_out(3) == ()
    # Two, so that each has a foreign memory to be compared with.
    for count in (4, 5, 6):
        save(chats, lines(*map(talk, range(count))))
        source = open_source(chats, options=SourceOptions(held_out_share=1e-9))
        assert (len(source), len(source.held_out(100))) == (count - 2, 2)


def test_what_a_file_lacks_is_counted(chats: Path) -> None:
    save(chats, lines(*map(talk, range(30)), {"messages": 1}, {**talk(99), "id": 1}))
    assert open_source(chats).skipped == {"a bad line": 1, "the unknown key row.id": 1}
    with pytest.raises(DataError, match="line 31"):
        open_source(chats, options=SourceOptions(max_bad=0.01))


# Mixtures.


def test_a_mixture_keeps_to_its_shares_and_goes_through_each_source(chats: Path) -> None:
    source = open_sources(["facts", chats], shares=[3, 1], seed=5)
    assert source.name == "facts+chats.jsonl"
    assert source.files == open_source(chats).files
    origins = [source.conversation(number).origin for number in range(400)]
    assert origins == [source.conversation(number).origin for number in range(400)]
    facts = [origin for origin in origins if origin.startswith("facts:")]
    rows = [origin for origin in origins if not origin.startswith("facts:")]
    assert facts == [f"facts:{number}" for number in range(300)]
    size = len(open_source(chats))
    assert len(set(rows[:size])) == size  # each once before any comes again
    assert set(rows[size : 2 * size]) == set(rows[:size])
    assert rows[size : 2 * size] != rows[:size]
    assert all(origins[start : start + 100].count("facts:0") <= 1 for start in range(0, 400, 100))
    assert sum(origin.startswith("facts:") for origin in origins[100:200]) == 75
    assert Counter(c.origin.split(":")[0] for c in source.held_out(8)) == {"facts": 6, "chats.jsonl": 2}


def test_impossible_mixtures_and_sources_are_refused(chats: Path, tmp_path: Path) -> None:
    assert open_sources([chats]).name == "chats.jsonl"
    facts: Source = open_source("facts")
    for shares in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ConfigError, match="as many shares above 0"):
            MixedSource([facts, facts], shares)
    with pytest.raises(ConfigError, match="hundredth"):
        MixedSource([facts, facts], [1000.0, 1.0])
    with pytest.raises(ConfigError, match="training needs data"):
        open_sources([])
    with pytest.raises(ConfigError, match="did you mean 'facts'"):
        open_source("fact")
    with pytest.raises(ConfigError, match="pass the directory"):
        open_source("sgd")
    with pytest.raises(DataError, match="no folder"):
        open_source("sgd", data_dir=tmp_path)
    with pytest.raises(ConfigError, match="held_out_share"):
        SourceOptions(held_out_share=2)
    with pytest.raises(ConfigError, match="'names'"):
        SourceOptions(held_out_parts=("names",))  # type: ignore[arg-type]
    empty = _Empty(open_source(chats))
    with pytest.raises(ConfigError, match=r"chats\.jsonl has no training conversation"):
        MixedSource([facts, empty])


class _Empty:
    """A source without training conversations."""

    def __init__(self, source: Source) -> None:
        self.name, self.licence, self.files, self.skipped = source.name, source.licence, source.files, source.skipped

    def __len__(self) -> int:
        return 0

    def conversation(self, number: int) -> Conversation:
        raise IndexError(number)

    def held_out(self, count: int) -> tuple[Conversation, ...]:
        return ()


# Public data sets.


def dialogue(identifier: str, *utterances: str) -> dict[str, Any]:
    turns = [
        {"speaker": ("USER", "SYSTEM")[n % 2], "utterance": text, "frames": [{"service_call": {}}] if n == 5 else []}
        for n, text in enumerate(utterances)
    ]
    return {"dialogue_id": identifier, "services": [], "turns": turns}


BOOKING = (
    "A table in Albany, please.",
    "Where?",
    "At Rokko.",
    "When?",
    "At two.",
    "A table at Rokko in Albany at 2 pm?",
    "Yes.",
    "Done.",
)


def item(identifier: str, value: str, said_again: int = 5) -> dict[str, Any]:
    return {"dialogue_id": identifier, "told": 0, "said_again": said_again, "slot": "city", "value": value}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    sgd = tmp_path / "sgd"
    save(sgd / "train.jsonl.xz", lines(dialogue("1_1", *BOOKING), dialogue("1_2", *BOOKING[:4])))
    save(
        sgd / "train.recall.jsonl",
        lines(
            item("1_1", "Albany"), item("1_1", "Rokko"), item("1_1", "Oslo"), item("1_1", "Albany", 6), item("9", "x")
        ),
    )
    save(sgd / "dev.jsonl", lines(dialogue("2_1", *BOOKING)))
    save(sgd / "dev.recall.jsonl", lines(item("2_1", "albany")))
    return tmp_path


def test_sgd_asks_for_what_is_said_again(data: Path) -> None:
    source = open_source("sgd", data_dir=data)
    assert len(source) == 1
    conversation = source.conversation(0)
    assert [text for _, text in texts(conversation)] == list(BOOKING[:4])
    assert not any(conversation.train)
    assert [ask.values for ask in conversation.asks] == [("Albany",), ("Rokko",)]
    for ask in conversation.asks:
        assert [message.content for message in ask.messages] == ["At two."]
        assert ask.reply.content == BOOKING[5]
    assert source.skipped == {
        "train: a dialogue that says nothing again": 1,
        "train: a service's call and results in a dialogue that is used": 1,
        "train: an item whose dialogue is missing": 1,
        "an item whose reply lacks the value, or whose question has it": 1,
        "an item that is no reply to a user": 1,
        "dev: a service's call and results in a dialogue that is used": 1,
    }
    assert [file.path.name for file in source.files] == [
        "train.recall.jsonl",
        "train.jsonl.xz",
        "dev.recall.jsonl",
        "dev.jsonl",
    ]


def test_sgd_holds_out_dev(data: Path) -> None:
    (held_out,) = open_source("sgd", data_dir=data).held_out(10)
    assert held_out.origin == "sgd:dev/2_1:5"
    assert held_out.asks[0].values == ("albany",)


def test_sgd_can_have_whole_dialogues_too(data: Path) -> None:
    source = open_source("sgd", data_dir=data, options=SourceOptions(whole_dialogues=True))
    assert len(source) == 3
    whole = source.conversation(1)
    assert [text for _, text in texts(whole)] == list(BOOKING)
    assert whole.train == (False, False, False, True, False, True, False, True)


def test_missing_and_damaged_files_are_named(data: Path) -> None:
    (data / "sgd" / "dev.jsonl").write_text('{"dialogue_id": "2_1", "turns": 3}\n')
    with pytest.raises(DataError, match="2_1 of sgd has `turns`"):
        open_source("sgd", data_dir=data)
    (data / "sgd" / "dev.jsonl").unlink()
    with pytest.raises(DataError, match=r"needs dev\.jsonl \(or dev\.jsonl\.xz\)"):
        open_source("sgd", data_dir=data)


def note(name: str, value: str, number: int) -> dict[str, str]:
    kind = "response" if name in ("api_response", "response") else "call"
    return {"name": name, "value": value, "context": f"api_{kind}_{number}"}


def order(identifier: str, *, arguments: str = '{"query": "Latte"}') -> dict[str, Any]:
    first = [
        note("api_call", "add_item", 0),
        note("request", arguments, 0),
        note("api_response", "add_item", 0),
        note("response", '{"order_id": "28740"}', 0),
    ]
    last = [note("api_call", "finish", 1), note("request", '{"order_id": "28740"}', 1)]
    said = [("user", "A latte, please.", first), ("assistant", "All right?", []), ("user", "Yes.", last)]
    utterances = [
        {"speaker": speaker, "text": text, "annotations": notes}
        for speaker, text, notes in [*said, ("assistant", "Thanks!", [])]
    ]
    return {"conversation_id": identifier, "utterances": utterances}


def test_taskmaster_has_plain_chats_or_calls_that_need_an_earlier_result(tmp_path: Path) -> None:
    short = {"conversation_id": "short", "utterances": order("x")["utterances"][:2]}
    orders = [*(order(f"o{number}") for number in range(30)), short, order("bad", arguments="{")]
    save(tmp_path / "taskmaster4" / "data_00.json.xz", json.dumps(orders))
    plain = open_source("taskmaster4", data_dir=tmp_path)
    assert plain.skipped == {
        "a call of a tool (the source was opened without tools)": 63,
        "a conversation of a single turn": 1,
    }
    conversation = plain.conversation(0)
    assert [text for _, text in texts(conversation)] == ["A latte, please.", "All right?", "Yes.", "Thanks!"]
    assert conversation.train == (False, False, False, True)
    assert not conversation.tools
    assert len(plain) + len(plain.held_out(100)) == 31
    assert plain.held_out(1)

    source = open_source("taskmaster4", data_dir=tmp_path, options=SourceOptions(tools=True))
    assert source.skipped["a conversation with a call whose arguments are no JSON object"] == 1
    conversation = source.conversation(0)
    assert [role for role, _ in texts(conversation)] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1].tool_calls[0].arguments == {"query": "Latte"}
    (ask,) = conversation.asks
    assert ask.values == ("28740",)
    assert ask.reply.tool_calls[0].arguments == {"order_id": "28740"}
    assert {tool["function"]["name"] for tool in ask.tools} == {"add_item", "finish"}


def test_personas_are_told_before_the_chat(tmp_path: Path) -> None:
    chats = [f"User 1: Hi {n}!\nUser 2: Hello.\nUser 1: Any pets?\nUser 2: A cat.\n\nShe is old." for n in range(30)]
    chats += ["User 1: Hi, [User 1's name]!\nUser 2: Hi.", "User 1: Hi.\n[Later]\nUser 2: Hi.", "User 1: Hi."]
    stream = io.StringIO()
    rows = [["user 1 personas", "user 2 personas", "Best Generated Conversation"]]
    csv.writer(stream).writerows(rows + [["I run.", "I have a cat.\nI am old.", chat] for chat in chats])
    save(tmp_path / "synthetic_persona_chat" / "valid.csv.xz", stream.getvalue())
    source = open_source("personas", data_dir=tmp_path)
    assert source.skipped == {
        "a chat that leaves a name or a fact open in brackets": 1,
        "a chat with stage directions": 1,
        "a chat of one speaker, or with an empty message": 1,
    }
    assert source.held_out(1)
    assert len(source) + len(source.held_out(100)) == 30
    conversation = source.conversation(0)
    assert "I have a cat.\nI am old." in conversation.messages[0].content
    assert conversation.messages[-1].content == "A cat.\nShe is old."
    assert conversation.train == (False, False, False, True, False, True)
