"""`agentmem chat` as a command, on tiny models in directories: the loader and the real engine."""

from __future__ import annotations

import shutil
from pathlib import Path

from typer.testing import CliRunner

from agentmem.errors import ConfigError, MissingAdapterError, ModelNotFoundError
from agentmem_cli.app import app


def chat(said: str, *arguments: object) -> str:
    done = CliRunner().invoke(app, ["chat", *map(str, arguments)], input=said)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_thread_outlives_its_engine(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--db", tmp_path / "threads.db", "--window", "1m")
    first = chat("hello\n/stats\n", *options)
    assert "(0 messages so far)" in first
    second = chat("/stats\nhow are you\n/stats\n", *options)
    assert "(2 messages so far)" in second
    assert _stats(first)[0] == _stats(second)[0]
    assert _stats(second)[1].startswith("4 messages consumed")


def test_one_question_is_answered_alone_in_a_thread_of_a_name(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--db", tmp_path / "threads.db", "--max-tokens", 3)
    shown = chat("", "hello", *options, "--thread", "one")
    assert "messages so far" not in shown
    assert "/help" not in shown
    assert "(0 messages so far)" in chat("", *options, "--thread", "two")
    assert "(2 messages so far)" in chat("", *options, "--thread", "one")


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


def test_what_is_wrong_with_the_options(tiny_model: Path, tmp_path: Path) -> None:
    bare, empty = tmp_path / "bare", tmp_path / "empty"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("adapter"))
    empty.mkdir()
    for options, refusal in (
        (("--window", "many"), ConfigError),
        (("--model", tiny_model, "--db", ""), ConfigError),
        (("--model", tiny_model, " \n"), ConfigError),
        (("--model", bare), MissingAdapterError),
        (("--model", empty), ModelNotFoundError),
    ):
        done = CliRunner().invoke(app, ["chat", "--db", str(tmp_path / "a.db"), *map(str, options)])
        assert isinstance(done.exception, refusal)


def _stats(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if "messages consumed" in line]
