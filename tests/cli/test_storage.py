"""`agentmem storage`: what it shows, what it takes out, what it asks before, and what it never does."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from typer.testing import CliRunner

from agentmem.errors import ConfigError, MissingExtraError, StorageError
from agentmem_cli import app as cli
from agentmem_cli import main
from agentmem_sql import SQLAlchemySaver

KEY = "k" * 32


def fill(saver: SQLAlchemySaver, *threads: str, size: int = 1000) -> None:
    """Four checkpoints on each thread."""
    for thread in threads:
        at: Any = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
        for number in range(4):
            made = empty_checkpoint()
            made["channel_values"] = {"x": os.urandom(size)}
            made["channel_versions"] = {"x": saver.get_next_version(None, None)}
            at = saver.put(at, made, {"source": "loop", "step": number}, made["channel_versions"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database with two threads."""
    path = tmp_path / "threads.db"
    with SQLAlchemySaver.from_url(f"sqlite:///{path}") as saver:
        fill(saver, "one", "two")
    return path


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LANGGRAPH_AES_KEY", "AGENTMEM_DATABASE"):
        monkeypatch.delenv(name, raising=False)


def storage(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(cli.app, ["storage", *map(str, arguments)], **options)


def shown(*arguments: object, **options: Any) -> str:
    done = storage(*arguments, **options)
    assert done.exit_code == 0, done.output
    return done.stdout


def told(*arguments: object) -> Any:
    return json.loads(shown(*arguments, "--json"))


def refusal(kind: type[Exception], *arguments: object) -> str:
    done = storage(*arguments)
    assert isinstance(done.exception, kind), done.output
    return str(done.exception) + done.output


def counts(path: Path, prefix: str = "agentmem_") -> dict[str, int]:
    """How many checkpoints each thread has, by plain SQL."""
    connection = sqlite3.connect(path)
    rows = connection.execute(
        f"SELECT name, count(*) FROM {prefix}threads JOIN {prefix}checkpoints ON thread = number GROUP BY name"
    ).fetchall()
    connection.close()
    return {name.decode(): number for name, number in rows}


def test_report(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SQLAlchemySaver.from_url(f"sqlite:///{file}") as saver:
        expected = saver.storage_report().to_dict()
    assert told("report", f"sqlite:///{file}") == expected
    assert told("report", file) == expected, "a path will do"
    first = told("report", file, "--limit", 1)
    assert [one["thread_id"] for one in first["threads"]] == ["one"]
    assert len(told("report", file, "--limit", 0)["threads"]) == 2
    table = shown("report", file)
    assert [line.split()[:2] for line in table.splitlines() if line.strip()][2:4] == [["one", "4"], ["two", "4"]]
    assert "2 threads" in table
    monkeypatch.setenv("AGENTMEM_DATABASE", f"sqlite:///{file}")
    assert told("report") == expected


@pytest.mark.parametrize("command", [("report",), ("prune", "--keep", 1, "--yes")])
def test_nothing_is_made_where_there_is_nothing(tmp_path: Path, command: tuple[object, ...]) -> None:
    name, *options = command
    missing, foreign = tmp_path / "none.db", tmp_path / "foreign.db"
    sqlite3.connect(foreign).execute("CREATE TABLE mine (x)").connection.close()
    before = foreign.read_bytes()
    assert "found nothing there" in refusal(StorageError, name, missing, *options)
    assert "found nothing there" in refusal(StorageError, name, f"sqlite:///{missing}", *options)
    assert "found a folder" in refusal(StorageError, name, tmp_path, *options)
    assert "agentmem_threads" in refusal(StorageError, name, foreign, *options)
    assert "in memory" in refusal(StorageError, name, "sqlite:///:memory:", *options)
    assert foreign.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.db"]
    foreign.write_bytes(b"no database" * 500)
    assert "file of another kind" in refusal(StorageError, name, foreign, *options)


def test_prune_takes_out_what_a_dry_run_says(file: Path) -> None:
    planned = told("prune", file, "--keep", 3, "--dry-run")
    assert (planned["dry_run"], planned["removed"], counts(file)) == (True, 2, {"one": 4, "two": 4})
    done = told("prune", file, "--keep", 3, "--yes")
    assert {**done, "dry_run": True} == planned
    assert counts(file) == {"one": 3, "two": 3}
    table = shown("prune", file, "--keep", 1, "--thread", "two", "--thread", "none", "--yes")
    assert counts(file) == {"one": 3, "two": 1}
    assert next(line.split() for line in table.splitlines() if "two" in line)[:3] == ["two", "2", "1"]


@pytest.mark.parametrize(("option", "left"), [("--idle", {"new": 4}), ("--max-age", {"old": 1, "new": 4})])
def test_prune_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, left: dict[str, int]) -> None:
    path = tmp_path / "threads.db"
    with SQLAlchemySaver.from_url(f"sqlite:///{path}") as saver:
        fill(saver, "new")
        ten_days_ago = time.time_ns() - 10 * 86_400 * 10**9
        with monkeypatch.context() as patch:
            patch.setattr(time, "time_ns", lambda: ten_days_ago)
            fill(saver, "old")
    for span in ("11d", "2w", "242h", "14460m", "866400s", "999999w"):
        assert told("prune", path, option, span, "--yes")["removed"] == 0
    assert ("thread deleted" in shown("prune", path, option, "9d", "--yes")) == (option == "--idle")
    assert counts(path) == left


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "nothing would ever go"),
        (("--keep", "1"), "--yes"),
        (("--keep", "1", "--json"), "--yes"),
        (("--keep", "0", "--yes"), "--keep"),
        (("--max-age", "30", "--yes"), "such as 30d"),
        (("--idle", "0d", "--yes"), "--idle"),
        (("--idle", "3 months", "--yes"), "--idle"),
    ],
)
def test_wrong_usage_removes_nothing(file: Path, options: tuple[str, ...], said: str) -> None:
    done = storage("prune", file, *options, input="y\n", env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert said in done.stderr
    assert counts(file) == {"one": 4, "two": 4}


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def answer(path: Path, text: str, *options: str) -> tuple[Any, str]:
    """Run `prune --keep 1` with a terminal as its input, and answer it."""
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.setattr(sys, "stdin", Terminal(text))
        patch.setattr(sys, "argv", ["agentmem", "storage", "prune", str(path), "--keep", "1", *options])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code, printed.getvalue()


def test_a_terminal_is_asked(file: Path) -> None:
    code, output = answer(file, "n\n")
    assert (code, counts(file)) == (1, {"one": 4, "two": 4})
    assert "would go" in output
    assert "Remove 6 checkpoints?" in output
    code, output = answer(file, "y\n", "--json")
    assert (code, counts(file)) == (2, {"one": 4, "two": 4}), "JSON has no room for a question"
    code, output = answer(file, "y\n")
    assert (code, counts(file)) == (0, {"one": 1, "two": 1})
    assert "removed" in output
    code, output = answer(file, "")
    assert code == 0, "there is nothing to ask"


def test_as_a_process(file: Path) -> None:
    """In one line of an error, and without loading torch, which a report needs no more."""
    code = (
        "import sys, agentmem_cli as cli\n"
        "for path in sys.argv[3:]:\n"
        "    sys.argv[3:] = [path, '--json']\n"
        "    try: cli.main()\n"
        "    except SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "storage", "report", str(file), f"{file}.none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *report, first, second = done.stdout.splitlines()
    assert (first, second) == ("0 False", "3 False"), done.stderr
    assert json.loads("".join(report))["thread_count"] == 2
    assert done.stderr.startswith("StorageError: expected a SQLite file")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def protected(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A database that is encrypted and signed, and the file of the key that signs."""
    path, key = tmp_path / "protected.db", tmp_path / "key"
    key.write_bytes(b"sixteen or more bytes\n")
    serde = EncryptedSerializer.from_pycryptodome_aes(key=KEY.encode())
    with SQLAlchemySaver.from_url(f"sqlite:///{path}", serde=serde, hmac_key=key.read_bytes()) as saver:
        fill(saver, "secret")
    return path, key


def test_protected_databases(protected: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, key = protected
    options = ("--encrypted", "--hmac-key-file", key)
    assert "LANGGRAPH_AES_KEY" in refusal(ConfigError, "report", path, *options)
    monkeypatch.setenv("LANGGRAPH_AES_KEY", "short")
    assert "16, 24 or 32" in refusal(ConfigError, "report", path, *options)
    monkeypatch.setenv("LANGGRAPH_AES_KEY", KEY)
    assert "encrypted" in refusal(StorageError, "prune", path, "--keep", 1, "--yes")
    assert "hmac_key" in refusal(StorageError, "prune", path, "--keep", 1, "--yes", "--encrypted")
    refusal(ConfigError, "report", path, "--encrypted", "--hmac-key-file", tmp_path / "none")
    assert counts(path) == {"secret": 4}
    assert told("report", path, *options)["checkpoints"] == 4
    assert told("prune", path, "--keep", 1, "--yes", *options)["removed"] == 3
    assert counts(path) == {"secret": 1}


def test_secrets_are_never_printed() -> None:
    for url in (
        "postgresql://someone:hunter2@127.0.0.1:1/none",
        "mysql://someone:hunter2@127.0.0.1:1/none",
        "postgresql://someone@127.0.0.1:1/none?password=hunter2&connect_timeout=1",
        "oracle://someone:hunter2@127.0.0.1:1/none",
        "postgresql://someone:hunter2@127.0.0.1:port/none",
        "postgresql://someone:hunter2/@127.0.0.1/none",
    ):
        said = refusal(StorageError, "report", url)
        assert "hunter2" not in said
        assert said


def test_prefix_and_schema(tmp_path: Path) -> None:
    path = tmp_path / "threads.db"
    for prefix in ("a_", "b_"):
        with SQLAlchemySaver.from_url(f"sqlite:///{path}", table_prefix=prefix) as saver:
            fill(saver, prefix)
    assert "agentmem_threads" in refusal(StorageError, "report", path)
    assert told("report", path, "--prefix", "b_")["threads"][0]["thread_id"] == "b_"
    assert told("prune", path, "--prefix", "b_", "--schema", "main", "--keep", 2, "--yes")["removed"] == 2
    assert (counts(path, "a_"), counts(path, "b_")) == ({"a_": 4}, {"b_": 2})
    refusal(StorageError, "report", path, "--prefix", "b_", "--schema", "none")


def test_thread_ids_cannot_command_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "threads.db"
    with SQLAlchemySaver.from_url(f"sqlite:///{path}") as saver:
        fill(saver, "\x1b[2Jäb[bold]\n\x00")
    wide = {"COLUMNS": "200"}
    for output in (shown("report", path, env=wide), shown("prune", path, "--keep", 1, "--yes", env=wide)):
        assert "\\x1b[2Jäb[bold]\\n\\x00" in output
        assert "\x1b[2J" not in output


def test_a_damaged_thread_is_named(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE agentmem_checkpoints SET created = 1 WHERE thread = 1")
    connection.close()
    done = storage("prune", file, "--keep", 1, "--yes", env={"COLUMNS": "400"})
    assert done.exit_code == 1
    assert "one: the checkpoint's row" in done.output
    assert counts(file) == {"one": 4, "two": 1}


def test_missing_packages_are_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert "pip install '.[sql]'" in refusal(MissingExtraError, "report", file)
