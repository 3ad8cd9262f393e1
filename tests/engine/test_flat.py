"""A turn costs what it shows and what is new, however long the thread is; and shortcuts never hide an edit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agentmem import MemoryState, Message, Sampling, Window
from agentmem.errors import TranscriptError
from agentmem.generation.plan import plan_remember
from agentmem.messages import ToolCall
from agentmem.prompt.transcript import Transcript
from agentmem.record import ConsumedRecord
from tests.helpers.transcript_templates import CHATML, GEMMA, LLAMA, MISTRAL, QWEN, tokenizer

SHORT = Sampling(max_tokens=3)


class Work:
    """Counts what a tokenizer is given to do."""

    def __init__(self, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown = self.read = 0
        render, encode = tok.apply_chat_template, type(tok).__call__

        def counted_render(conversation: Any, **options: Any) -> Any:
            self.shown += len(conversation)
            return render(conversation, **options)

        def counted_encode(own: Any, text: str, **options: Any) -> Any:
            self.read += len(text)
            return encode(own, text, **options)

        monkeypatch.setattr(tok, "apply_chat_template", counted_render)
        monkeypatch.setattr(type(tok), "__call__", counted_encode)

    def take(self) -> tuple[int, int]:
        done, self.shown, self.read = (self.shown, self.read), 0, 0
        return done


def test_late_turns_render_tokenise_and_write_what_early_ones_do(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    work = Work(engine.tokenizer, monkeypatch)
    history: list[Message] = []
    state, done, written = None, [], []
    for n in range(60):
        history.append(Message("user", f"number {100 + n} is here"))
        turn = engine.turn(history, state, window=Window(messages=5), sampling=SHORT)
        history.append(turn.message)
        state = turn.state
        done.append(work.take())
        written.append(turn.written - len(turn.token_ids))
    assert {shown for shown, _ in done[20:]} == {done[20][0]}
    assert max(read for _, read in done[50:]) <= 1.5 * max(read for _, read in done[10:20])
    assert set(written[5:]) == {written[5]}  # the window slides on; nothing in it is written again


def test_closing_the_engine_frees_what_was_worked_out_about_messages(make_engine: Any) -> None:
    engine = make_engine()
    engine.turn([Message("user", "hello there")], sampling=SHORT)
    assert engine.message_cache.size > 0
    engine.close()
    assert engine.message_cache.size == 0


def test_remembering_one_more_message_renders_its_neighbourhood(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    history = [Message("user" if n % 2 == 0 else "assistant", f"number {n}") for n in range(100)]
    state = engine.remember(history).state
    work = Work(engine.tokenizer, monkeypatch)
    history.append(Message("user", "and one more"))
    assert engine.remember(history, state).written > 0
    assert work.shown < 12


TALK = [
    Message("system", "Be brief."),
    Message("user", "hello there"),
    Message("assistant", "Hi."),
    Message("user", "what is it?"),
    Message("assistant", "", tool_calls=(ToolCall("look", {"at": "x"}, "000000001"),)),
    Message("tool", "found", tool_call_id="000000001", name="look"),
    Message("assistant", "<think>\nwhy\n</think>\n\nIt is found."),
    Message("user", "thanks"),
    Message("assistant", "You are welcome."),
    Message("user", "again?"),
    Message("assistant", "Yes."),
]


@pytest.mark.parametrize("template", [CHATML, QWEN, LLAMA, GEMMA, MISTRAL])
@pytest.mark.parametrize("lead", [0, 1])
def test_what_is_written_unseen_has_the_tokens_that_it_has_in_the_whole_history(template: str, lead: int) -> None:
    talk = [m for m in TALK[lead:] if template != GEMMA or not (m.tool_calls or m.role == "tool")]
    transcript = Transcript(tokenizer(template))
    try:
        whole = transcript.render(talk)
    except TranscriptError:
        pytest.skip("the template knows no such conversation")
    for known in range(len(talk) + 1):
        record = ConsumedRecord.empty().extend(talk[:known])
        state = MemoryState.zeros([1, 1, 1, 1], "model", "adapter").replaced(record=record)
        plan = plan_remember(talk, state, transcript, "token", 4096)
        new = {i for i in range(known, len(talk)) if talk[i].writes}
        expected = [token for token, owner in zip(whole.input_ids, whole.owner, strict=True) if owner in new]
        assert [token for chunk in plan.catch_up_chunks for token in chunk.ids] == expected


def test_a_call_that_is_changed_in_place_is_an_edit(make_engine: Any) -> None:
    engine = make_engine()
    arguments = {"at": ["x"]}
    history = [
        Message("user", "look"),
        Message("assistant", "", tool_calls=(ToolCall("look", arguments, "1"),)),
        Message("tool", "found", tool_call_id="1"),
    ]
    first = engine.turn(history, sampling=SHORT)
    history += [first.message, Message("user", "again")]
    assert engine.turn(history, first.state, sampling=SHORT).edits == ()
    arguments["at"].append("y")
    assert engine.turn(history, first.state, sampling=SHORT).edits == (1,)


@pytest.mark.parametrize("window", [Window(), Window(messages=1)])
def test_the_state_leaves_the_device_once(make_engine: Any, monkeypatch: pytest.MonkeyPatch, window: Window) -> None:
    engine = make_engine()
    left: list[tuple[int, ...]] = []
    cpu = torch.Tensor.cpu

    def counted(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        left.append(tuple(self.shape[-4:]))
        return cpu(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    # With a window of one message the first two are written by a pass of their own.
    history = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    turn = engine.turn(history, window=window, sampling=SHORT)
    assert turn.state is not None
    assert left.count(tuple(turn.state.shape)) == 1


def test_logits_are_computed_for_last_positions_only(make_engine: Any) -> None:
    engine = make_engine()
    positions: list[int] = []
    engine.model.lm_head.register_forward_pre_hook(lambda _, given: positions.append(given[0].shape[1]))
    turn = engine.turn([Message("user", "hello there " * 700)], sampling=SHORT)
    assert turn.usage.input_tokens > 1024  # several passes, of which the last one has logits
    assert positions == [1] * len(turn.token_ids)
    positions.clear()
    engine.remember([Message("user", "hello there")])
    assert positions == []
