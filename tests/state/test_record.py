"""Which messages of a history are new to a memory that has consumed some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.errors import ConfigError, CorruptStateError, HistoryEditedError, StateMismatchError
from agentmem.messages import Message, ToolCall
from agentmem.record import Alignment, ConsumedRecord, History


def user(text: str) -> Message:
    return Message("user", text)


def reply(text: str) -> Message:
    return Message("assistant", text)


def system(text: str) -> Message:
    return Message("system", text)


def consumed(messages: Sequence[Message]) -> ConsumedRecord:
    return ConsumedRecord.empty().extend(messages)


def thread(turns: int) -> list[Message]:
    return [m for n in range(turns) for m in (user(f"question {n}"), reply(f"answer {n}"))]


TURN = [user("go on"), reply("done")]
FACT = Message("user", "retrieved", write=False)
NEXT = user("next")
MIXED = [system("be brief"), user("a"), FACT, reply("b"), FACT, user("c")]
TALK = [user("hi"), reply("hello"), user("is it 5?"), reply("yes"), user("bye"), reply("bye"), user("hi")]
BACK = [user("0"), reply("done"), user("1"), reply("a"), user("2"), reply("done")]
# What a memory has consumed, the history that it is given, and what of it is new.
HISTORIES: dict[str, tuple[list[Message], list[Message], Alignment]] = {
    "nothing consumed": ([], thread(2), Alignment(new=[0, 1, 2, 3])),
    "nothing shared": (thread(2), [user("x"), reply("y")], Alignment(new=[0, 1])),
    "messages that never write": (MIXED[:4], MIXED, Alignment(new=[5], consumed=[1, 3], silent=[0, 2, 4])),
    "goes on after the whole chain": (thread(3)[:4], thread(3), Alignment(new=[4, 5], consumed=[0, 1, 2, 3])),
    "a repeat after the chain": ([*TURN], [*TURN, user("go on")], Alignment(new=[2], consumed=[0, 1])),
    "a repeat after a trimmed head": (
        [user("a"), user("ok"), user("b"), user("ok")],
        [user("ok"), user("ok")],
        Alignment(new=[1], consumed=[0]),
    ),
    "a long thread of equal turns without its head": (
        TURN * 300,
        [*TURN * 300, user("go on")][1:],
        Alignment(new=[599], consumed=list(range(599))),
    ),
    "a trimmed head": (
        thread(6)[:-1],
        [system("x"), *thread(6)[-4:]],
        Alignment(new=[4], consumed=[1, 2, 3], silent=[0]),
    ),
    "a middle that was removed": (
        thread(5),
        [thread(5)[0], thread(5)[4], thread(5)[9], NEXT],
        Alignment(new=[3], consumed=[0, 1, 2], deletions=7),
    ),
    "a silent summary": (
        thread(4),
        [system("what was said"), *thread(4)[-3:], NEXT],
        Alignment(new=[4], consumed=[1, 2, 3], silent=[0]),
    ),
    "a summary": (
        thread(4),
        [user("what was said"), *thread(4)[-3:], NEXT],
        Alignment(new=[0, 4], consumed=[1, 2, 3], edits=[0]),
    ),
    "a summary before repeated turns": (
        [*TURN, *TURN],
        [user("summary"), reply("done"), user("go on")],
        Alignment(new=[0, 2], consumed=[1], edits=[0]),
    ),
    "an edit at the head": (
        thread(3),
        [user("question zero"), *thread(3)[1:], NEXT],
        Alignment(new=[0, 6], consumed=[1, 2, 3, 4, 5], edits=[0]),
    ),
    "an edit between equal messages": (
        TALK,
        [*TALK[:2], user("is it 6?"), *TALK[3:]],
        Alignment(new=[2], consumed=[0, 1, 3, 4, 5, 6], edits=[2]),
    ),
    "a reply taken back without a rewind": (
        BACK,
        [*BACK[:4], user("2!")],
        Alignment(new=[4], consumed=[0, 1, 2, 3], deletions=2),
    ),
}


for kept in (2, 3, 4, 5):
    HISTORIES[f"the last {kept} of equal turns"] = (
        TURN * 3,
        [*TURN * 3, user("go on")][-kept:],
        Alignment(new=[kept - 1], consumed=list(range(kept - 1))),
    )


@pytest.mark.parametrize(("old", "history", "expected"), HISTORIES.values(), ids=HISTORIES.keys())
def test_what_of_a_history_is_new(old: list[Message], history: list[Message], expected: Alignment) -> None:
    assert consumed(old).align(history) == expected


def test_a_tool_call_edited_by_a_human_is_new() -> None:
    ask = user("remove the old files")
    call = Message("assistant", "", tool_calls=(ToolCall("rm", {"path": "/"}, "1"),))
    edited = Message("assistant", "", tool_calls=(ToolCall("rm", {"path": "/tmp/old"}, "1"),))
    result = Message("tool", "removed", tool_call_id="1", name="rm")
    record = consumed([ask, call])
    assert record.align([ask, edited, result]) == Alignment(new=[1, 2], consumed=[0], deletions=1)
    # The next turn knows the edited call in its place.
    record = record.align([ask, edited, result]).record.extend([reply("done")])
    assert record.count == 5
    assert record.align([ask, edited, result, reply("done"), user("thanks")]).new == [4]


def test_on_edit_error_names_the_message() -> None:
    history = [system("be brief"), *thread(2)]
    edited = [history[0], history[1], reply("a rather " + "long " * 40 + "answer"), *history[3:]]
    with pytest.raises(HistoryEditedError, match=r"message 2 \(assistant: 'a rather long") as caught:
        consumed(history).align(edited, on_edit="error")
    assert len(str(caught.value)) < 400
    assert consumed(history[:3]).align(history, on_edit="error").new == [3, 4]


def test_on_edit_rebuild_asks_for_everything_anew() -> None:
    history = [system("be brief"), *thread(2)]
    edited = [history[0], user("changed"), *history[2:], user("next")]
    alignment = consumed(history).align(edited, on_edit="rebuild")
    assert alignment == Alignment(new=[1, 2, 3, 4, 5], edits=[1], silent=[0], rebuild=True)
    assert not consumed(history).align(history, on_edit="rebuild").rebuild
    with pytest.raises(ConfigError, match="on_edit"):
        consumed(history).align(edited, on_edit="ignore")  # type: ignore[arg-type]


def test_more_than_256_messages_by_the_chain_and_by_the_tail() -> None:
    history = thread(200)
    record = consumed(history)
    assert (record.count, len(record.tail)) == (400, 256 * 8)
    after = [*history, user("next")]
    assert record.align(after) == Alignment(new=[400], consumed=list(range(400)))
    # The oldest is gone: the chain no longer fits, and what precedes the tail is taken as consumed.
    assert record.align(after[1:]) == Alignment(new=[399], consumed=list(range(399)))
    # An edit inside the tail is found; one before it cannot be.
    edited = list(after)
    edited[300] = user("changed")
    assert record.align(edited).new == [300, 400]
    assert record.align(edited).edits == [300]
    edited[300], edited[10] = history[300], user("changed")
    assert record.align(edited).new == [400]


def test_repeats_older_than_the_tail_do_not_draw_matches_away() -> None:
    old = [user("ok"), *thread(40)]
    tail = [user("ok"), *[user(f"m{n}") for n in range(255)]]
    record = consumed([*old, *tail])
    history = [*old[:5], *old[6:], *tail, user("next")]
    assert record.align(history).new == [len(history) - 1]


def test_a_tail_of_exactly_256_is_not_yet_full() -> None:
    history = thread(128)
    alignment = consumed(history).align([user("summary"), *history[100:], user("next")])
    assert alignment.new == [0, 157]


def test_the_spelling_of_arguments_does_not_matter_and_everything_else_does() -> None:
    first = Message("assistant", "x", tool_calls=(ToolCall("f", {"a": 1, "b": [2]}, "id"),), name="n")
    record = consumed([first])
    for same in (
        replace(first, tool_calls=(ToolCall("f", {"b": [2], "a": 1}, "id"),)),
        replace(first, name="signed afterwards"),
    ):
        assert record.align([same]).new == []
    others = [
        replace(first, role="user"),
        replace(first, content="y"),
        replace(first, tool_call_id="1"),
        replace(first, tool_calls=()),
        replace(first, tool_calls=(ToolCall("g", {"a": 1, "b": [2]}, "id"),)),
        replace(first, tool_calls=(ToolCall("f", {"a": 1, "b": [3]}, "id"),)),
        replace(first, tool_calls=(ToolCall("f", {"a": 1, "b": [2]}, "other"),)),
    ]
    assert all(record.align([other]).new == [0] for other in others)


def test_a_record_that_does_not_fit_together_is_refused() -> None:
    record = consumed(thread(2))
    for changes in (
        {"count": -1},
        {"count": True},
        {"count": 3},
        {"chain": record.chain[:-1]},
        {"tail": record.tail + b"\0"},
        {"tail": record.tail.hex()},
    ):
        with pytest.raises(CorruptStateError):
            replace(record, **changes)


@pytest.mark.parametrize("left", [thread(1), thread(150)], ids=["short", "longer than the tail"])
def test_parallel_branches_merge_into_the_record_of_the_joined_history(left: list[Message]) -> None:
    base, right = thread(2), [reply("r")]
    record = consumed(base)
    merged = record.merge([record.extend(left), record, record.extend(right)])
    assert merged.count == len([*base, *left, *right])
    # What precedes a full tail is no longer known message by message.
    assert len(left) > 256 or merged == consumed([*base, *left, *right])
    assert merged.align([*base, *left, *right, user("next")]).new == [len(base) + len(left) + 1]


def test_a_branch_that_does_not_continue_the_base_is_refused() -> None:
    record = consumed(thread(2))
    others = [user(f"other {n}") for n in range(9)]
    for other in (consumed(thread(1)), consumed(others), consumed(others[:5]).align(others).record):
        with pytest.raises(StateMismatchError, match="same base"):
            record.merge([other])


texts = st.lists(st.sampled_from(["ok", "done", "yes", "a", "b"]).map(user), max_size=12)


@given(texts, texts)
def test_what_is_appended_to_a_whole_history_is_exactly_what_is_new(old: list[Message], new: list[Message]) -> None:
    alignment = consumed(old).align([*old, *new])
    assert alignment.new == list(range(len(old), len(old) + len(new)))
    assert alignment.consumed == list(range(len(old)))
    assert not alignment.edits


@given(st.integers(1, 300), st.integers(0, 5), st.data())
def test_trimming_the_head_of_distinct_messages_changes_nothing(old: int, new: int, data: st.DataObject) -> None:
    messages = [user(str(n)) for n in range(old + new)]
    kept = data.draw(st.integers(1, old))
    alignment = consumed(messages[:old]).align(messages[old - kept :])
    assert alignment == Alignment(new=list(range(kept, kept + new)), consumed=list(range(kept)))


@given(st.lists(st.sampled_from(["keep", "remove", "replace", "insert before"]), min_size=1, max_size=40))
def test_distinct_messages_that_stay_are_consumed_and_all_others_new(fates: list[str]) -> None:
    old = [user(str(n)) for n in range(len(fates))]
    history, stay = [], []
    for message, fate in zip(old, fates, strict=True):
        if fate in ("replace", "insert before"):
            history.append(user(f"not {message.content}"))
        if fate in ("keep", "insert before"):
            stay.append(len(history))
            history.append(message)
    alignment = consumed(old).align(history)
    assert alignment.consumed == stay
    assert alignment.new == [i for i in range(len(history)) if i not in stay]
    assert alignment.edits == [i for i in alignment.new if stay and i < stay[-1]]


@given(texts, texts, st.sampled_from(["write", "rebuild"]))
def test_every_message_is_consumed_or_new_and_never_both(
    old: list[Message], history: list[Message], on_edit: str
) -> None:
    alignment = consumed(old).align(history, on_edit=on_edit)  # type: ignore[arg-type]
    assert sorted([*alignment.new, *alignment.consumed]) == list(range(len(history)))
    assert set(alignment.edits) <= set(alignment.new)
    # What is taken as consumed was consumed, each as often as it is there.
    assert not Counter(history[i] for i in alignment.consumed) - Counter(old)
    # A second look, after the new ones were written, finds nothing.
    again = alignment.record.align(history)
    assert not again.new
    assert not again.edits
    assert not again.deletions


class Thread:
    """A thread of distinct messages, what a memory has of it, and how often each text was written."""

    def __init__(self) -> None:
        self.history: list[Message] = []
        self.record = ConsumedRecord.empty()
        self.written: Counter[str] = Counter()
        self.texts = count()
        self.turns = [self.snapshot()]

    def snapshot(self) -> tuple[list[Message], ConsumedRecord, Counter[str]]:
        return list(self.history), self.record, self.written.copy()

    def fresh(self) -> Message:
        return user(f"text {next(self.texts)}")

    def turn(self) -> Alignment:
        """A question and its reply. Whoever writes changes nothing but the record."""
        self.history.append(self.fresh())
        alignment = self.record.align(self.history)
        self.written.update(self.history[place].content for place in alignment.new)
        answer = reply(f"text {next(self.texts)}")
        self.written[answer.content] += 1
        self.history.append(answer)
        self.record = alignment.record.extend([answer])
        self.turns.append(self.snapshot())
        return alignment

    def change(self, kind: str, draw: Callable[[int], int]) -> None:
        """Change the history as a middleware or a person would; `draw(n)` is a number below n."""
        history = self.history
        if kind == "fork":
            kept, self.record, written = self.turns[draw(len(self.turns))]
            self.history, self.written = list(kept), written.copy()
        elif kind == "clear":
            history.clear()
        elif history and kind == "edit":
            history[draw(len(history))] = self.fresh()
        elif history and kind == "delete":
            del history[draw(len(history))]
        elif history and kind == "summarise":
            history[: draw(len(history))] = [self.fresh()]
        elif history and kind == "trim":
            del history[: draw(len(history))]
        elif history and kind == "reorder":
            history.insert(draw(len(history)), history.pop(draw(len(history))))


CHANGES = ("append", "edit", "delete", "summarise", "trim", "clear", "reorder", "fork")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(CHANGES), max_size=25), st.data())
def test_every_text_is_written_exactly_once_whatever_is_done_to_a_history(
    changes: list[str], data: st.DataObject
) -> None:
    thread = Thread()
    for kind in changes:
        thread.change(kind, lambda n: data.draw(st.integers(0, n - 1)))
        alignment = thread.turn()
        assert all(thread.written[message.content] == 1 for message in thread.history)
        assert set(thread.written.values()) == {1}
        assert thread.record.count == thread.written.total()
        # A turn without a change before it has nothing to report, whatever was done to the thread earlier.
        untouched = Thread.__new__(Thread)
        untouched.__dict__.update(vars(thread), turns=[], written=thread.written.copy(), history=list(thread.history))
        later = untouched.turn()
        assert len(later.new) == 1
        assert not later.edits
        assert not later.deletions
        if kind in ("append", "trim", "clear", "reorder"):
            assert not alignment.edits
        if kind == "append":
            assert not alignment.deletions


def test_notes_follow_a_thread_and_what_says_nothing_changes_nothing() -> None:
    history = thread(3)
    record = consumed(history)
    assert record.align([system("be brief")]).record == record.align([]).record == record
    noted = record.align([user("a note")]).record
    assert noted.count == 7
    assert noted.align([*history, user("next")]).new == [6]
    assert noted.align([*history, user("a note"), user("next")]).new == [7]


def test_a_deletion_is_told_from_a_trimmed_head_and_starts_a_rebuild_anew() -> None:
    history = thread(3)
    record = consumed(history)
    trimmed = record.align([*history[2:], user("next")], on_edit="rebuild")
    assert not trimmed.deletions
    assert not trimmed.rebuild
    shorter = [*history[:2], *history[3:], user("next")]
    assert record.align(shorter) == Alignment(new=[5], consumed=[0, 1, 2, 3, 4], deletions=1)
    rebuilt = record.align(shorter, on_edit="rebuild")
    assert rebuilt == Alignment(new=[0, 1, 2, 3, 4, 5], deletions=1, rebuild=True)
    assert rebuilt.record == consumed(shorter)


def test_records_that_covered_names_are_still_read() -> None:
    history = [user("look"), Message("tool", "found", tool_call_id="1", name="look"), reply("done")]
    digests = [message.digest(with_name=True)[:8] for message in history]
    record = ConsumedRecord.empty()._extend(digests)
    alignment = record.align([*history, user("next")])
    assert alignment == Alignment(new=[3], consumed=[0, 1, 2])
    assert alignment.record == consumed([*history, user("next")])


def test_a_branch_that_edited_or_trimmed_its_history_merges() -> None:
    base = thread(3)
    record = consumed(base)
    edited = record.align([user("changed"), *base[1:], user("left")]).record
    trimmed = record.align([*base[4:], user("right")]).record
    assert record.additions(edited) == [message.digest()[:8] for message in (user("changed"), user("left"))]
    merged = record.merge([edited, trimmed])
    assert merged.count == 6 + 2 + 1
    assert merged.align([*base, user("left"), user("right"), user("next")]).new == [8]


def test_a_history_is_read_again_where_it_is_new() -> None:
    history = [*thread(3), Message("assistant", "", (ToolCall("f", {}, "1"),)), user("next")]
    read = History.read(history)
    kept = read.unchangeable()
    assert kept == History.read(history[:6])
    assert History.read(history, kept) == read
