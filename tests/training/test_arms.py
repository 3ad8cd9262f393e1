"""Measuring with controls: nano, whose memory works, against arms that know nothing; and how replies are judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

import agentmem
from agentmem import Engine, Message
from agentmem.delta.adapter import save_adapter
from agentmem.errors import ConfigError, MissingAdapterError, StateMismatchError
from agentmem.messages import ToolCall
from agentmem.nano.recipe.language import answer, ask, change, draw_bindings, filler, redraw, tell
from agentmem.training.arms import measure, probes_of
from agentmem.training.contexts import BASIC, Arm, Ranker
from agentmem.training.conversations import Ask, Conversation
from agentmem.training.intervals import gain, share
from agentmem.training.judging import contains, is_judged, judge
from agentmem.training.predictions import ArmResults, Probe


@pytest.fixture(scope="module")
def nano() -> Iterator[Engine]:
    with agentmem.load("nano") as engine:
        yield engine


def said(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(m for user, reply in turns for m in (Message("user", user), Message("assistant", reply)))


def conversation(number: int, facts: int = 2) -> Conversation:
    """Facts in nano's language, the first of them changed later, and a question for each."""
    rng = Random(f"arms {number}")
    bindings = draw_bindings(rng, facts)
    new = redraw(rng, bindings[0])
    turns = [*(tell(rng, b) for b in bindings), filler(rng), change(rng, new)]
    asks = tuple(
        Ask(
            (Message("user", ask(rng, b.attribute)),),
            Message("assistant", answer(b)),
            (b.value,),
            (bindings[0].value,) if b is new else (),
            kind="changed" if b is new else "ask",
        )
        for b in [new, *bindings[1:]]
    )
    messages = said(*turns)
    return Conversation(messages, (False,) * len(messages), asks=asks, origin=f"test:{number}")


@pytest.fixture(scope="module")
def probes() -> tuple[Probe, ...]:
    return probes_of([conversation(number) for number in range(12)])


@pytest.fixture(scope="module")
def results(nano: Engine, probes: tuple[Probe, ...]) -> ArmResults:
    return measure(nano, probes, BASIC)


def test_a_memory_that_works_beats_its_controls(results: ArmResults) -> None:
    shares = {arm: results.share(arm) for arm in BASIC}
    assert all(s.questions == 24 for s in shares.values())
    assert shares["memory"].value > 0.85
    assert shares["whole"].value > 0.7
    assert max(shares[arm].value for arm in ("zero", "foreign", "bare")) < 0.25
    assert results.score == shares["memory"].value - max(shares["zero"].value, shares["foreign"].value)
    assert results.gain.low > 0.5
    assert results.of_kind("changed").share_naming_forbidden("memory").value < 0.3
    assert results.of_kind("changed").share("memory").questions == 12
    assert "memory" in results.summary()


def test_only_the_whole_conversation_is_in_a_prompt(results: ArmResults) -> None:
    """All other arms read a prompt of the same length: the question."""
    by_arm = {arm: [p.prompt_tokens for p in results.predictions if p.arm == arm] for arm in BASIC}
    assert by_arm["memory"] == by_arm["zero"] == by_arm["foreign"] == by_arm["bare"]
    assert min(by_arm["whole"]) > 2 * max(by_arm["memory"])


def test_arms_may_show_part_of_the_conversation(nano: Engine, probes: tuple[Probe, ...]) -> None:
    arms: tuple[Arm, ...] = ("bare", "window", "retrieval", "window_memory", "constant")
    shown = measure(nano, probes[:6], arms, context_tokens=24)
    tokens = {arm: shown.prompt_tokens(arm) for arm in arms}
    assert tokens["constant"] == 0
    for arm in ("window", "retrieval"):
        assert tokens["bare"] < tokens[arm] <= tokens["bare"] + 24
    assert tokens["window_memory"] == tokens["window"]
    assert shown.share("window_memory").value > 0.6
    assert 0 < shown.share("constant").value < 0.9
    assert shown.seconds("constant") == 0 < shown.seconds("window")
    assert shown.gain_over("window_memory", "bare", "constant").value > 0.2


def test_the_hybrid_shows_passages_only_where_the_memory_fails(
    nano: Engine, probes: tuple[Probe, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(max_tokens: int, name: str = "") -> dict[str, list[dict[str, Any]]]:
        path = tmp_path / f"{max_tokens}{name}.jsonl"
        arms: tuple[Arm, ...] = ("memory", "retrieval", "hybrid")
        measure(nano, probes[:4], arms, context_tokens=64, max_tokens=max_tokens, predictions=path)
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return {arm: sorted((r for r in rows if r["arm"] == arm), key=lambda r: str(r["prompt"])) for arm in arms}

    whole = asked(24)
    for memory, hybrid in zip(whole["memory"], whole["hybrid"], strict=True):
        assert memory["right"], "else this test says nothing"
        assert hybrid["reply"] == memory["reply"]
        assert hybrid["prompt_tokens"] == memory["prompt_tokens"]
        assert not hybrid["context"]
        assert hybrid["kept_bytes"] > memory["kept_bytes"]
    cut = asked(1)  # one token states nothing, so no draft stands
    for memory, retrieval, hybrid in zip(cut["memory"], cut["retrieval"], cut["hybrid"], strict=True):
        assert hybrid["context"]
        assert memory["prompt_tokens"] < hybrid["prompt_tokens"] <= retrieval["prompt_tokens"]
    monkeypatch.setattr("agentmem.training.arms.MOST_TOLD", 8)  # more was said than the memory holds
    long = asked(24, "long")
    for retrieval, hybrid in zip(long["retrieval"], long["hybrid"], strict=True):
        assert [hybrid[key] for key in ("reply", "context", "prompt_tokens")] == [
            retrieval[key] for key in ("reply", "context", "prompt_tokens")
        ]


def test_a_ranker_decides_which_passages_dense_shows(nano: Engine, probes: tuple[Probe, ...], tmp_path: Path) -> None:
    def shown(name: str, rank: Ranker) -> list[str]:
        path = tmp_path / name
        measure(nano, probes[:2], ("dense",), context_tokens=36, max_tokens=1, nearest=rank, predictions=path)
        return [json.loads(line)["context"] for line in path.read_text("utf-8").splitlines()]

    told = [message.content for message in probes[0].told if message.role != "system"]
    first = shown("first", lambda texts, _: [-float(place) for place in range(len(texts))])
    last = shown("last", lambda texts, _: [float(place) for place in range(len(texts))])
    assert all(told[0] in context and told[-1] not in context for context in first)  # there is room for two at most
    assert all(told[-1] in context and told[0] not in context for context in last)
    with pytest.raises(ConfigError, match="need a ranker of passages"):
        measure(nano, probes[:2], ("dense",))


def test_several_conversations_may_be_one_cluster(nano: Engine, probes: tuple[Probe, ...]) -> None:
    joined = measure(nano, [replace(probe, cluster=probe.conversation // 2) for probe in probes], ("constant",))
    assert [asked for _, asked in joined.counts("constant")] == [4] * 6


def test_conversations_can_be_written_live(nano: Engine, probes: tuple[Probe, ...]) -> None:
    live = measure(nano, probes[:8], writing="live")
    assert live.share("memory").value > 0.85
    assert live.score > 0.6


def test_a_whole_prompt_fills_an_empty_memory_or_is_only_read(nano: Engine, probes: tuple[Probe, ...]) -> None:
    turns: list[tuple[Any, Any]] = []

    class Watching(Counting):
        def turn(self, *args: Any, **options: Any) -> Any:
            turns.append((args[1], (turn := super().turn(*args, **options)).state))
            return turn

    watching: Any = Watching(nano)
    measure(watching, probes[:3], ("whole_memory",), max_tokens=1, concurrency=1)
    assert all(before is None and after != nano.zero_state() for before, after in turns)
    turns.clear()
    measure(watching, probes[:3], ("whole_foreign",), max_tokens=1, concurrency=1)
    states = [before for before, _ in turns]
    assert all(before == after != nano.zero_state() for before, after in turns)
    assert len({state.digest for state in states}) == 2, "the first two questions are about one conversation"


class Counting:
    """An engine that counts its turns and writes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.turns = self.written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def turn(self, *args: Any, **options: Any) -> Any:
        self.turns += 1
        return self._engine.turn(*args, **options)

    def remember(self, *args: Any, **options: Any) -> Any:
        self.written += 1
        return self._engine.remember(*args, **options)


def test_a_conversation_is_written_once_and_memoryless_arms_are_asked_once(nano: Engine) -> None:
    first = conversation(1)
    same = [replace(conversation(n), asks=first.asks) for n in range(3)]
    engine = Counting(nano)
    results = measure(engine, probes_of(same), ("memory", "zero", "bare"))  # type: ignore[arg-type]
    assert engine.written == 3 * 4
    assert engine.turns == 3 * 2 + 2 + 2
    assert results.share("zero").questions == 6


def test_an_interrupted_measurement_is_continued(nano: Engine, probes: tuple[Probe, ...], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "predictions.jsonl"
    few = probes[:6]
    arms: tuple[Arm, ...] = ("memory", "zero", "foreign")
    seen: list[tuple[int, int]] = []
    full = measure(nano, few, arms, predictions=file, labels={"cell": "2 facts"}, on_progress=lambda *n: seen.append(n))
    assert seen[0] == (0, 18)
    assert seen[-1] == (18, 18)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 18
    assert {row["cell"] for row in rows} == {"2 facts"}
    assert {row["adapter_fingerprint"] for row in rows} == {nano.adapter_fingerprint}
    assert [row["right"] for row in rows if row["arm"] == "zero"].count(True) == full.share("zero").right

    again = Counting(nano)
    assert measure(again, few, arms, predictions=file) == full  # type: ignore[arg-type]
    assert (again.turns, again.written) == (0, 0)

    # Killed in the middle of a line: what is missing is asked again, and only that.
    lines = file.read_text().splitlines(keepends=True)
    lost = next(n for n, line in enumerate(lines) if '"memory"' in line)
    file.write_text("".join(line for n, line in enumerate(lines) if n != lost) + lines[lost][:40])
    again = Counting(nano)
    assert measure(again, few, arms, predictions=file) == full  # type: ignore[arg-type]
    assert (again.turns, again.written) == (1, 4)
    # Other questions, another limit: asked anew.
    again = Counting(nano)
    measure(again, few, ("zero",), predictions=file, max_tokens=3)  # type: ignore[arg-type]
    assert again.turns == len({p.ask.messages[0].content for p in few})


def test_the_engine_that_asks_may_be_another(nano: Engine, probes: tuple[Probe, ...], results: ArmResults) -> None:
    with agentmem.load("nano") as other:
        restarted = measure(nano, probes[:8], ("memory",), asker=lambda: other)
    expected = [p.right for p in results.predictions if p.arm == "memory"][:8]
    assert [p.right for p in restarted.predictions] == expected


def test_a_state_of_another_adapter_is_refused(nano: Engine, probes: tuple[Probe, ...], tmp_path: Path) -> None:
    assert nano.steered is not None
    adapter = nano.steered.adapter
    save_adapter(tmp_path, replace(adapter, tensors={name: 2 * t for name, t in adapter.tensors.items()}))
    with agentmem.load("nano", adapter=tmp_path) as other, pytest.raises(StateMismatchError):
        measure(nano, probes[:2], ("memory",), asker=lambda: other)


def test_what_cannot_be_measured_is_refused(nano: Engine, probes: tuple[Probe, ...]) -> None:
    with pytest.raises(ConfigError, match="no question can be judged"):
        measure(nano, ())
    with pytest.raises(ConfigError, match="another conversation"):
        measure(nano, probes[:2])
    with pytest.raises(ConfigError, match=r"arms are memory, zero.*found zeroed"):
        measure(nano, probes, ("zeroed",))  # type: ignore[arg-type]
    result = (*probes[0].told, Message("tool", "42", tool_call_id="1"))
    with pytest.raises(ConfigError, match="tool results"):
        measure(nano, [Probe(result, probes[0].ask, 0)], ("memory",), writing="live")
    with pytest.raises(ConfigError, match="window_memory shows the replies as they are given"):
        measure(nano, probes, ("window_memory",), writing="live")
    with pytest.raises(ConfigError, match="context_tokens are at least 16"):
        measure(nano, probes, ("window",), context_tokens=2)
    with pytest.raises(ConfigError, match="constant arm needs questions with accepted values"):
        measure(nano, [Probe(probes[0].told, question(check=str.isupper), 0)], ("constant",))
    with agentmem.load("nano", adapter=False) as bare, pytest.raises(MissingAdapterError):
        measure(bare, probes)


def test_the_foreign_memory_is_of_a_conversation_of_the_same_length(nano: Engine) -> None:
    """Two lengths: the partner is never the conversation itself, and of its own length where there is one."""
    conversations = [conversation(n, facts) for n, facts in enumerate((1, 2, 1, 2, 1))]
    told = [c.messages for c in conversations]
    probes = [Probe(m, question(values=("x",), text=f"Question {n}?"), n) for n, m in enumerate(told)]
    written: dict[bytes, int] = {}

    class Engines(Counting):
        def remember(self, messages: Any, *args: Any) -> Any:
            done = super().remember(messages, *args)
            if tuple(messages) in told:
                written[done.state.matrices.tobytes()] = told.index(tuple(messages))
            return done

        def turn(self, messages: Any, state: Any, **options: Any) -> Any:
            asked[messages[-1].content] = written[state.matrices.tobytes()]
            return super().turn(messages, state, **options)

    asked: dict[str, int] = {}
    measure(Engines(nano), probes, ("foreign",), max_tokens=2)  # type: ignore[arg-type]
    assert len(asked) == 5
    for number in range(5):
        partner = asked[f"Question {number}?"]
        assert partner != number
        assert len(told[partner]) == len(told[number])


# Judging.


@pytest.mark.parametrize(
    ("text", "value", "there"),
    [
        ("Your dog's name is Bruno.", "Bruno", True),
        ("bruno!", "Bruno", True),
        ("Brunos", "Bruno", False),
        ("It is 12.", "12", True),
        ("It is 120.", "12", False),
        ("It is 12.5.", "12", False),
        ("It is 1,212.", "212", False),
        ("v12", "12", False),
        ("The version is 1.2.", "1.2", True),
        ("The version is 1.2.3.", "1.2", False),
        ("See src/app.py.", "src/app.py", True),
        ("See lib/src/app.py.", "src/app.py", False),
        ("The red-brown one", "red", False),
        ("It is called blue  fox, I think", "blue fox", True),
        ("At 10:30", "10:3", False),
        ("anything", "", False),
    ],
)
def test_values_count_as_a_whole(text: str, value: str, there: bool) -> None:
    assert contains(text, value) is there


def verdict(ask: Ask, text: str, *calls: ToolCall) -> tuple[bool, bool]:
    found = judge(ask, Message("assistant", text, calls))
    return found.right, found.named_forbidden


def question(reply: str = "", *, text: str = "?", **options: Any) -> Ask:
    return Ask((Message("user", text),), Message("assistant", reply), **options)


def test_guesses_are_not_right() -> None:
    asked = question(values=("teal",), forbidden=("red",))
    assert verdict(asked, "It is teal.") == (True, False)
    assert verdict(asked, "It is teal, not red.") == (False, True)
    assert verdict(asked, " ".join(["blue", "green", "teal"] * 11)) == (False, False)
    assert verdict(asked, "") == (False, False)
    checked = question(check=str.isupper)
    assert verdict(checked, "YES.") == (True, False)
    assert verdict(checked, "Yes.") == (False, False)
    assert verdict(checked, "NO " * 31) == (False, False)


def test_tool_calls_are_judged_by_their_arguments() -> None:
    call = ToolCall("send_message", {"recipient": "Bruno"})
    asked = Ask((Message("user", "Send it."),), Message("assistant", "", (call,)), ("Bruno",), kind="tool_call")
    assert verdict(asked, "", call)[0]
    assert not verdict(asked, "", ToolCall("send_message", {"recipient": "Rex"}))[0]
    assert not verdict(asked, "", ToolCall("open_ticket", {"recipient": "Bruno"}))[0]
    assert not verdict(asked, "send_message(Bruno)")[0]


def test_questions_without_values_are_not_asked() -> None:
    assert not is_judged(question("Fine."))
    assert probes_of([replace(conversation(0), asks=(question("Fine."),))]) == ()


def test_gains_are_paired_by_conversation() -> None:
    arm, control = [(1, 2), (2, 2), (0, 2)] * 40, [(0, 2), (1, 2), (0, 2)] * 40
    found = gain(arm, [control, [(0, 2)] * 120])
    assert found.value == pytest.approx(0.5 - 1 / 6)
    assert found.low < found.value < found.high
    # Paired: conversations that are easy for both say nothing about the difference.
    unpaired = share(arm).high - share(arm).low
    assert found.high - found.low < unpaired
    certain = gain([(1, 1)] * 30, [[(0, 1)] * 30])
    assert certain.value == 1.0
    assert 0.6 < certain.low < 1.0
    with pytest.raises(ValueError, match="same questions"):
        gain(arm, [control[1:]])
    with pytest.raises(ValueError, match="needs controls"):
        gain(arm, [])
