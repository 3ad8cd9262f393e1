"""`agentmem chat` as a command, on tiny models in directories: the loader, the real engine, real processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from agentmem.errors import ConfigError, MissingAdapterError, ModelNotFoundError
from agentmem_cli.app import app


def chat(said: str, *arguments: object) -> str:
    done = CliRunner().invoke(app, ["chat", *map(str, arguments)], input=said)
    assert done.exit_code == 0, done.output
    return done.output


def in_a_process(said: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from agentmem_cli import main; main()", "chat", *map(str, arguments)],
        input=said,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_thread_outlives_its_process(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--db", tmp_path / "threads.db", "--window", "1m")
    first = chat("hello\n/stats\n", *options)
    assert "(0 messages so far)" in first
    second = in_a_process("/stats\nhow are you\n/stats\n", *options)
    assert "(2 messages so far)" in second
    assert _stats(first)[0] == _stats(second)[0]
    assert _stats(second)[1].startswith("4 messages consumed")


def test_one_question_is_answered_alone(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--db", tmp_path / "threads.db", "--max-tokens", 3)
    first = chat("", "hello", *options)
    assert "messages so far" not in first
    assert "/help" not in first
    assert "(2 messages so far)" in chat("", *options)


def test_a_database_by_its_url_and_a_bare_model(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--adapter", "none", "--device", "cpu", "--dtype", "bfloat16")
    shown = chat("hello\n/stats\n", *options, "--db", f"sqlite:///{tmp_path / 'threads.db'}")
    assert "(bfloat16 on cpu), adapter none" in shown
    assert "this model has no memory" in shown
    assert "(2 messages so far)" in chat("", *options, "--db", tmp_path / "threads.db")


def test_the_thread_of_another_adapter_is_refused(tiny_model: Path, other_adapter: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--db", tmp_path / "threads.db")
    first = chat("hello\n/stats\n", *options)
    shown = chat("again\n/stats\n", *options, "--adapter", other_adapter)
    assert "StateMismatchError" in shown
    assert _stats(first) == _stats(shown)
    assert "(2 messages so far)" in chat("", *options)


def test_threads_have_names(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--db", tmp_path / "threads.db")
    chat("hello\n", *options, "--thread", "one")
    assert "(0 messages so far)" in chat("", *options, "--thread", "two")
    assert "(2 messages so far)" in chat("", *options, "--thread", "one")


def test_what_is_wrong_with_the_options(tiny_model: Path, other_adapter: Path, tmp_path: Path) -> None:
    run = CliRunner()
    window = run.invoke(app, ["chat", "--db", str(tmp_path / "a.db"), "--window", "many"])
    assert isinstance(window.exception, ConfigError)
    empty = tmp_path / "empty"
    empty.mkdir()
    no_model = run.invoke(app, ["chat", "--db", str(tmp_path / "a.db"), "--model", str(empty)])
    assert isinstance(no_model.exception, ModelNotFoundError)
    shutil.copy(tiny_model / "config.json", empty)
    no_adapter = run.invoke(app, ["chat", "--db", str(tmp_path / "a.db"), "--model", str(empty)])
    assert isinstance(no_adapter.exception, MissingAdapterError)


def _stats(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if "messages consumed" in line]
