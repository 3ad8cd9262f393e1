"""The coding assistant: its tools, confined to the repository and bounded; two sessions in two processes, and the
control.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import ToolException
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from coding_assistant.__main__ import kept, main, play
from coding_assistant.agent import build_agent, chat_model
from coding_assistant.runner import run, words_of
from coding_assistant.session import Outcome
from coding_assistant.tools import CHANGING, Tools
from coding_assistant.workspace import REPOSITORY, Workspace
from tests.examples.test_programs import EXAMPLES, started


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(Workspace.copy_of(REPOSITORY, tmp_path / "repository"))


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.py", "tests/../../secret.py", "..\\secret.py", "a\0b"])
def test_paths_that_lead_outside_are_refused(tools: Tools, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.py").write_text("secret")
    for use in (tools.read_file, lambda path: tools.edit_file(path, "secret", "known")):
        with pytest.raises(ToolException, match="is not inside the repository"):
            use(name)
    assert (tmp_path / "secret.py").read_text() == "secret"


def test_links_are_refused_and_not_listed(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "other.py").write_text("secret")
    root = tools.workspace.root
    (root / "link.py").symlink_to(tmp_path / "secret.py")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "inner.py").symlink_to(root / "prices.py")
    for name in ("link.py", "folder/other.py", "inner.py"):
        with pytest.raises(ToolException, match="is a symbolic link"):
            tools.read_file(name)
    for name in ("link", "other", "inner"):
        with pytest.raises(ToolException, match=f"no file {name}"):
            tools.read_file(name)
    listed = tools.list_files()
    assert "prices.py" in listed
    assert not any(name in listed for name in ("link", "folder", "inner"))
    assert "secret" not in tools.search_code("secret").replace("No secret was found.", "")


def test_looking(tools: Tools) -> None:
    assert tools.list_files().splitlines() == [
        "Makefile", "basket.py", "prices.py", "fixes/round rule.toml", "fixes/whole rule.toml", "tests/__init__.py",
        "tests/test_shop.py",
    ]  # fmt: skip
    assert tools.read_file("prices") == tools.read_file("prices.py")
    assert tools.search_code("def discounted").startswith("prices.py:")


def test_the_fix_that_was_tried_fails_and_the_other_one_does_not(tmp_path: Path) -> None:
    outcomes = {}
    for fix in ("", "round rule", "whole rule"):
        tools = Tools(Workspace.copy_of(REPOSITORY, tmp_path / f"with {fix}"))
        if fix:
            tools.apply_fix(fix)
        outcomes[fix] = tools.run_tests("make test")
        assert tools.run_tests("unittest") == outcomes[fix]
    assert outcomes == {
        "": "Error: 1 of 5 tests failed.",
        "round rule": "Error: 1 of 5 tests failed.",
        "whole rule": "5 passed.",
    }
    assert tools.prepare_fix("round rule") == "The next fix is whole rule."
    assert tools.prepare_fix("anything") == "The next fix is round rule."


def test_names_follow_the_style_everywhere_and_the_tests_still_pass(tools: Tools) -> None:
    planned = str(tools.planned("format_names", {"code_style": "snake case"}))
    assert "-def lineTotal(" in planned
    assert "+def line_total(" in planned
    assert "lineTotal" in tools.read_file("prices"), "a plan changes nothing"
    tools.apply_fix("whole rule")
    assert tools.format_names("snake case") == "Done."
    assert "lineTotal" not in tools.read_file("prices") + tools.read_file("basket")
    assert tools.run_tests("unittest") == "5 passed."
    with pytest.raises(ToolException, match="No name differs from snake case"):
        tools.format_names("snake case")
    with pytest.raises(ToolException, match="style nonsense is not known"):
        tools.format_names("nonsense")


def test_an_edit_needs_one_place(tools: Tools) -> None:
    with pytest.raises(ToolException, match="occurs 2 times"):
        tools.edit_file("prices.py", "int) -> int", "int) -> float")
    with pytest.raises(ToolException, match="occurs 0 times"):
        tools.edit_file("prices.py", "", "x")
    assert tools.edit_file("prices.py", "whole cents", "cents") == "Done."
    assert tools.read_file("prices").startswith('"""Prices in cents."""')


def test_every_changing_tool_can_be_planned(tools: Tools) -> None:
    assert set(CHANGING) <= {tool.name for tool in tools.all()}
    for name, arguments in (("apply_fix", {"name": "../../etc/passwd"}), ("edit_file", {"path": "prices.py"})):
        refusal = tools.planned(name, arguments)
        assert isinstance(refusal, ToolException)
        assert str(refusal).startswith("Error: ")


def test_a_refusal_is_a_result(tools: Tools) -> None:
    (read,) = (tool for tool in tools.all() if tool.name == "read_file")
    assert read.invoke({"path": "/etc/passwd"}) == "Error: '/etc/passwd' is not inside the repository."


@pytest.mark.parametrize("command", ["rm -rf .", "unittest; ls", "python evil.py", "pytest --basetemp=/tmp", "", "'",
                                     "make", "make test all", "make -f/tmp/evil.mk", "make SHELL=evil"])  # fmt: skip
def test_other_commands_are_refused(command: str) -> None:
    with pytest.raises(ToolException, match=r"^Error: "):
        words_of(command)


def test_commands_that_run() -> None:
    assert words_of("unittest") == [sys.executable, "-m", "unittest"]
    assert words_of("python -m unittest discover -q") == [sys.executable, "-m", "unittest", "discover", "-q"]
    assert words_of("make test")[1:] == ["-s", "test", f"PYTHON={sys.executable}"]


def test_tests_that_hang_are_ended_with_what_they_started(tmp_path: Path) -> None:
    (tmp_path / "test_hang.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    for seconds in (1, 10):  # on a busy machine it takes time for the child to be there
        with pytest.raises(ToolException, match="more than"):
            run("unittest", tmp_path, seconds=seconds)
        if (tmp_path / "child").exists() and (tmp_path / "child").read_text():
            break
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not _alive(child):
            break
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_the_tests_see_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "API_KEY", "secret")
    (tmp_path / "test_env.py").write_text(
        "import os, unittest\nclass T(unittest.TestCase):\n    def test_it(self): assert 'API_KEY' not in os.environ\n"
    )
    assert run("unittest", tmp_path) == "1 passed."


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
