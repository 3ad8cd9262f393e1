"""Which messages a prompt shows, and where history is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem.errors import ConfigError, WindowError
from agentmem.messages import Message, ToolCall
from agentmem.prompt.transcript import Window, pieces, tool_groups

SYSTEM, USER, REPLY = Message("system", "s"), Message("user", "u"), Message("assistant", "a")


def call(*ids: str) -> Message:
    return Message("assistant", "", tool_calls=tuple(ToolCall("f", {}, i) for i in ids))


def result(of: str) -> Message:
    return Message("tool", "r", tool_call_id=of)


def groups(messages: list[Message]) -> list[list[int]]:
    """Oldest first."""
    return list(tool_groups(messages))[::-1]


def shown(window: Window, messages: list[Message], size: int = 10, overhead: int = 0) -> list[int]:
    return window.visible(messages, [size] * len(messages), overhead)


def test_the_default_is_4096_tokens() -> None:
    assert Window() == Window(tokens=4096, messages=None)
    assert shown(Window(), [USER] * 100, size=100) == list(range(60, 100))


def test_the_last_messages_that_fit_the_tokens() -> None:
    talk = [USER, REPLY] * 5
    assert shown(Window(35), talk) == [7, 8, 9]
    assert shown(Window(30), talk) == [7, 8, 9]
    assert shown(Window(30), talk, overhead=1) == [8, 9]
    assert Window(30).visible(talk, [1] * 8 + [29, 1]) == [8, 9]
    # Not what is older and would fit.
    assert Window(30).visible([USER] * 4, [1, 25, 10, 10]) == [2, 3]
    with pytest.raises(ValueError, match="1 for 2"):
        Window().visible([USER, REPLY], [1])


def test_the_last_messages_by_number() -> None:
    talk = [SYSTEM, *[USER, REPLY] * 5]
    assert shown(Window(None, 4), talk) == [0, 7, 8, 9, 10]
    assert shown(Window(25, 4), talk) == [0, 10]
    assert shown(Window(None, 1), talk) == [0, 10]
    assert shown(Window(None, None), talk) == list(range(11))


def test_system_messages_always_show_and_take_tokens() -> None:
    talk = [SYSTEM, USER, REPLY, SYSTEM, USER, REPLY]
    assert shown(Window(40), talk) == [0, 3, 4, 5]
    assert shown(Window(20), [SYSTEM, SYSTEM]) == [0, 1]


def test_a_call_and_its_results_show_together_or_not_at_all() -> None:
    talk = [USER, call("1", "2"), result("1"), result("2"), REPLY, USER]
    assert shown(Window(50), talk) == [1, 2, 3, 4, 5]
    assert shown(Window(49), talk) == [4, 5]
    assert shown(Window(None, 4), talk) == [4, 5]


def test_groups_by_id_and_by_place() -> None:
    assert groups([call("1"), result("1"), call("2"), result("2")]) == [[0, 1], [2, 3]]
    assert groups([call("1"), call("2"), result("1"), result("2")]) == [[0, 1, 2, 3]]
    assert groups([call(""), result(""), USER]) == [[0, 1], [2]]
    assert groups([call("1"), SYSTEM, result("1"), USER]) == [[0, 2], [3]]
    assert groups([result("1"), USER]) == [[0], [1]]
    assert groups([]) == []


def test_the_last_message_and_its_calls_must_fit() -> None:
    talk = [SYSTEM, USER, call("1"), result("1")]
    assert shown(Window(30), talk) == [0, 2, 3]
    with pytest.raises(WindowError, match=r"29 tokens .* 10 tokens of system messages, 20 of the last message"):
        shown(Window(29), talk)
    with pytest.raises(WindowError, match="5 of tools and prompt"):
        shown(Window(30), talk, overhead=5)
    # A number of messages is never too small for them.
    assert shown(Window(None, 1), talk) == [0, 2, 3]
    with pytest.raises(WindowError, match="20 tokens of system messages, 0 of the last"):
        shown(Window(15), [SYSTEM, SYSTEM])


def test_a_model_that_reads_less_clips_the_window() -> None:
    assert Window().clip(1000) == Window(1000)
    assert Window(500, 3).clip(1000) == Window(500, 3)
    assert Window(None, 3).clip(1000) == Window(1000, 3)
    assert Window().clip(None) == Window()


@pytest.mark.parametrize("limits", [(0, None), (-1, None), (None, 0), (True, None), (1.5, None)])
def test_a_limit_that_is_no_positive_integer_is_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="positive integer"):
        Window(*limits)


def test_pieces_are_cut_between_messages() -> None:
    assert pieces([1000, 1000, 48, 1, 2048, 1], 2048) == [[0, 1, 2], [3], [4], [5]]
    assert pieces([5000, 10, 10], 2048) == [[0], [1, 2]]
    assert pieces([3, 3, 3], limit=6) == [[0, 1], [2]]
    assert pieces([0, 0], 2048) == [[0, 1]]
    assert pieces([], 2048) == []


@given(st.lists(st.integers(0, 3000), max_size=30))
def test_pieces_hold_every_message_once_in_order(sizes: list[int]) -> None:
    cut = pieces(sizes, 2048)
    assert [i for piece in cut for i in piece] == list(range(len(sizes)))
    assert all(len(piece) == 1 or sum(sizes[i] for i in piece) <= 2048 for piece in cut)
    # No two neighbours would have fitted one piece.
    assert all(sum(sizes[i] for i in [*a, b[0]]) > 2048 for a, b in pairwise(cut))


kinds = st.sampled_from([SYSTEM, USER, REPLY, call("1"), call("1", "2"), call("2"), result("1"), result("2")])


@given(st.lists(st.tuples(kinds, st.integers(1, 20)), max_size=20), st.integers(1, 120), st.integers(1, 12))
def test_a_window_holds_its_promises(talk: list[tuple[Message, int]], tokens: int, count: int) -> None:
    messages, sizes = [m for m, _ in talk], [n for _, n in talk]
    try:
        seen = Window(tokens, count).visible(messages, sizes)
    except WindowError:
        runs = groups(messages)
        needed = [i for i, m in enumerate(messages) if m.role == "system"] + (runs[-1] if runs else [])
        assert sum(sizes[i] for i in needed) > tokens
        return
    assert sum(sizes[i] for i in seen) <= tokens
    runs = groups(messages)
    assert sum(messages[i].role != "system" for i in seen) <= max(count, len(runs[-1]) if runs else 0)
    assert {i for i, m in enumerate(messages) if m.role == "system"} <= set(seen)
    assert all(set(group) <= set(seen) or not set(group) & set(seen) for group in runs)
    if messages:
        assert len(messages) - 1 in seen


class Counted(list[int]):
    """Sizes that note which of them were asked for."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(sizes)
        self.asked: set[int] = set()

    def __getitem__(self, index: Any) -> Any:
        self.asked.add(index)
        return super().__getitem__(index)


def test_only_messages_that_may_show_are_measured() -> None:
    talk = [SYSTEM, *([USER, call("1"), result("1"), REPLY] * 500)]
    sizes = Counted([10] * len(talk))
    assert Window(100).visible(talk, sizes) == [0, *range(1992, 2001)]
    assert sizes.asked == {0, *range(1990, 2001)}  # and the group that no longer fits: two messages


def by_looking_at_everything(messages: list[Message]) -> list[list[int]]:
    """Groups as they are defined, found from the oldest message on."""
    others = [i for i, m in enumerate(messages) if m.role != "system"]
    spans: list[tuple[int, int]] = []
    callers: dict[str, int] = {}
    latest: int | None = None
    for place, message in enumerate(messages[i] for i in others):
        if message.tool_calls:
            latest = place
            callers |= {c.id: place for c in message.tool_calls if c.id}
        elif message.role == "tool" and (caller := callers.get(message.tool_call_id, latest)) is not None:
            spans.append((caller, place))
    cuts = [at for at in range(len(others) + 1) if not any(a < at <= b for a, b in spans)]
    return [others[a:b] for a, b in pairwise(cuts)]


anything = st.sampled_from(
    [SYSTEM, USER, REPLY, *(call(*i) for i in ("1", "12", "2", "")), *map(result, ("1", "2", "3"))]
)


@given(st.lists(st.one_of(anything, st.just(call("")), st.just(result(""))), max_size=20))
def test_groups_are_found_from_the_end_as_from_the_beginning(messages: list[Message]) -> None:
    assert groups(messages) == by_looking_at_everything(messages)
