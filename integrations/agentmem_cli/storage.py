"""`agentmem storage`: shows how much space threads take, and deletes what a policy does not keep."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from agentmem.errors import ConfigError
from agentmem.text import printable
from agentmem_sql import Retention, RetentionReport, SQLAlchemySaver, StorageReport

_KEY = "LANGGRAPH_AES_KEY"
_UNITS = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
_SHOWN = 20  # threads in the table of a prune; the sums are over all threads


@dataclass(frozen=True)
class Place:
    """A database, its tables, and how they are protected."""

    url: str
    prefix: str
    schema: str | None
    encrypted: bool
    hmac_key_file: Path | None

    @property
    def full_url(self) -> str:
        """The URL; a text without a scheme is the path of a SQLite file."""
        return self.url if "://" in self.url else f"sqlite:///{self.url}"

    @property
    def serde(self) -> SerializerProtocol:
        """The serializer.

        Raises:
            ConfigError: the database is encrypted, and the key cannot be read.
        """
        # Nothing in a database makes these commands import or call anything.
        strict = JsonPlusSerializer(allowed_msgpack_modules=None)
        return _encrypting(strict) if self.encrypted else strict

    def open(self, *, make: bool = False, cache_bytes: int = 0) -> SQLAlchemySaver:
        """A saver on an existing database, creating neither file nor tables; with `make` they are created if needed.

        Args:
            make: whether to create what is missing.
            cache_bytes: as for `SQLAlchemySaver`; a command that reads each thing once has no use for a cache.

        Raises:
            StorageError: there is no such database, or it holds no threads.
            ConfigError: a key cannot be read.
        """
        return SQLAlchemySaver.from_url(
            self.full_url,
            serde=self.serde,
            schema=self.schema,
            table_prefix=self.prefix,
            hmac_key=None if self.hmac_key_file is None else read_key(self.hmac_key_file),
            cache_bytes=cache_bytes,
            must_exist=not make,
        )


def report(place: Place, limit: int, as_json: bool) -> None:
    """Show how much space the threads of a database take."""
    with place.open() as saver, Console(stderr=True).status("measuring"):
        sizes = saver.storage_report(limit=limit or None)
    if as_json:
        _print_json(sizes.to_dict())
    else:
        Console().print(_sizes(sizes))


def prune(place: Place, stays: Retention, threads: list[str] | None, *, dry_run: bool, as_json: bool, yes: bool) -> int:
    """Show what a policy does not keep, ask, and delete it. Returns the exit code: 1 if some threads failed."""
    if not (dry_run or yes) and (as_json or not sys.stdin.isatty()):
        raise typer.BadParameter("nobody can be asked here: pass --yes to delete, or --dry-run to see what would go")
    console = Console()
    with place.open() as saver:
        done = None if dry_run or yes else _ask(saver, stays, threads, console)
        if done is None:
            done = _sweep(saver, stays, threads, dry_run=dry_run)
    if as_json:
        _print_json(done.to_dict())
    else:
        console.print(_swept(done))
    return 1 if done.failed else 0


def _ask(
    saver: SQLAlchemySaver, stays: Retention, threads: list[str] | None, console: Console
) -> RetentionReport | None:
    """Show what would be deleted and ask. None means go on; a report means that there is nothing more to do."""
    planned = _sweep(saver, stays, threads, dry_run=True)
    if not planned.threads:
        return planned
    console.print(_swept(planned))
    typer.confirm(f"Remove {_count(planned.removed, 'checkpoint')}?", abort=True)
    return None


def _sweep(saver: SQLAlchemySaver, stays: Retention, threads: list[str] | None, *, dry_run: bool) -> RetentionReport:
    with Console(stderr=True).status("looking" if dry_run else "sweeping"):
        return saver.retain(stays, thread_ids=threads, dry_run=dry_run)


def policy(keep: int | None, max_age: str | None, idle: str | None) -> Retention:
    """The retention policy that the options describe."""
    if keep is None and max_age is None and idle is None:
        raise typer.BadParameter("nothing would ever go: pass --keep, --max-age or --idle")
    return Retention(
        max_checkpoints=keep,
        max_age=None if max_age is None else _span("--max-age", max_age),
        idle=None if idle is None else _span("--idle", idle),
    )


def _span(option: str, text: str) -> timedelta:
    """A duration such as 90d, 12h or 45m."""
    match = re.fullmatch(r"(\d{1,6})([smhdw])", text.strip())
    if match is None or not int(match[1]):
        message = f"expected a number above zero and a unit (s, m, h, d, w), such as 30d, found {text!r}"
        raise typer.BadParameter(message, param_hint=option)
    return int(match[1]) * _UNITS[match[2]]


def _encrypting(serde: JsonPlusSerializer) -> EncryptedSerializer:
    if _KEY not in os.environ:
        raise ConfigError(f"expected the key of an encrypted database in the environment variable {_KEY}, found none")
    try:
        return EncryptedSerializer.from_pycryptodome_aes(serde)
    except ImportError as error:
        raise ConfigError("encrypted databases need the package pycryptodome; run: pip install pycryptodome") from error
    except ValueError as error:
        raise ConfigError(f"expected {_KEY} to be 16, 24 or 32 bytes, found {len(os.environ[_KEY])}") from error


def read_key(file: Path) -> bytes:
    """The bytes of a key file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"the key file cannot be read: {error}") from error


def _print_json(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=2))


def _sizes(report: StorageReport) -> Table:
    table = _table("checkpoints", "writes", "content", "rows", "last stored, UTC")
    for thread in report.threads:
        sizes = (decimal(thread.content_bytes), decimal(thread.row_bytes))
        when = "" if thread.newest is None else f"{thread.newest:%Y-%m-%d %H:%M}"
        table.add_row(_name(thread.thread_id), str(thread.checkpoints), str(thread.pending_writes), *sizes, when)
    table.add_section()
    sizes = (decimal(report.content_bytes), decimal(report.row_bytes))
    all_threads = _threads(report.thread_count, len(report.threads))
    table.add_row(all_threads, str(report.checkpoints), str(report.pending_writes), *sizes, "", style="bold")
    return table


def _swept(report: RetentionReport) -> Table:
    table = _table("would go" if report.dry_run else "removed", "left", "freed")
    shown = report.threads[:_SHOWN]
    for thread in shown:
        left = "none, thread deleted" if thread.deleted else str(thread.kept)
        table.add_row(_name(thread.thread_id), str(thread.removed), left, decimal(thread.bytes_freed))
    for thread_id, error in report.failed.items():
        table.add_row(Text.assemble(_name(thread_id), (f": {printable(str(error))}", "red")), "", "", "")
    table.add_section()
    sums = (str(report.removed), str(report.kept), decimal(report.bytes_freed))
    table.add_row(_threads(len(report.threads), len(shown)), *sums, style="bold")
    return table


def _table(*numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("thread", overflow="fold")
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _name(thread_id: str) -> Text:
    """A thread's id, with control characters escaped for the terminal."""
    return Text(printable(thread_id, lines=False))


def _threads(number: int, shown: int) -> str:
    return _count(number, "thread") + (f" ({shown} shown)" if shown < number else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
