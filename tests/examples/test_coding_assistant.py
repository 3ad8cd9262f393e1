"""The coding assistant as its page runs it: two sessions in two processes, and the control."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from coding_assistant.__main__ import kept, main, play
from coding_assistant.agent import build_agent, chat_model
from coding_assistant.session import Outcome
from coding_assistant.tools import Tools
from coding_assistant.workspace import REPOSITORY, Workspace
from tests.examples.test_programs import EXAMPLES, started


@pytest.mark.slow
def test_what_was_told_steers_the_tools_of_another_process(tmp_path: Path) -> None:
    done = started("coding_assistant", "--yes", "--data", str(tmp_path / "data"))
    assert done.returncode == 0, done.stdout + done.stderr
    told, worked, without = done.stdout.split("\nSession two, ")[0], *done.stdout.split("memory off")[:2]
    assert "make test" in told
    assert "assistant calls run_tests(test_command='make test')" in worked
    assert "assistant calls format_names(code_style='snake case')" in worked
    assert "wants apply_fix(name='whole rule')" in worked
    assert "test_command='make test'" not in without
    changed = tmp_path / "data" / "with-memory" / "repository" / "prices.py"
    assert "def line_total(" in changed.read_text()
    shipped = EXAMPLES / "coding_assistant" / "repository" / "prices.py"
    assert "def lineTotal(" in shipped.read_text(), "the repository that ships is never changed"


def test_nobody_is_asked_where_nobody_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["coding_assistant", "--data", str(tmp_path / "data")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "pass --yes" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="holds other things"):
        play("nano", None, tmp_path, yes=True)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(("decision", "changed"), [("approve", True), ("reject", False)])
def test_nothing_changes_before_a_human_agrees(tmp_path: Path, decision: str, changed: bool) -> None:
    tools = Tools(Workspace.copy_of(REPOSITORY, tmp_path / "repository"))
    before = tools.read_file("prices")
    call = {"name": "apply_fix", "args": {"name": "whole rule"}, "id": "1", "type": "tool_call"}
    llm = chat_model("nano", None)
    agent = build_agent(llm, tools.all(), InMemorySaver(), model="nano")
    thread = RunnableConfig(configurable={"thread_id": "1"})
    # As if the model had called: what is tested comes after it.
    asked = [HumanMessage("Apply the fix."), AIMessage("", tool_calls=[call])]
    agent.update_state(thread, {"messages": asked}, as_node="model")
    agent.invoke(None, thread)
    assert agent.get_state(thread).interrupts
    assert tools.read_file("prices") == before
    agent.invoke(Command(resume={"decisions": [{"type": decision}]}), thread, interrupt_before=["model"])
    llm.close()
    assert (tools.read_file("prices") != before) == changed


def test_a_broken_promise_is_told_from_a_kept_one() -> None:
    good = Outcome(right={"run the tests": True}, proposed="whole rule", tests="5 passed.", renamed=True)
    assert kept(good)
    short = [{"right": {"run the tests": False}}, {"proposed": "round rule"}, {"proposed": ""}, {"renamed": False}]
    for change in [*short, {"tests": "Error: 1 of 5 tests failed."}]:
        assert not kept(Outcome(**{**vars(good), **change}))
