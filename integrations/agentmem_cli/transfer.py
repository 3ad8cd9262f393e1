"""`agentmem storage import`: copies threads from another checkpointer's database.

Only the parameters are defined at the top; everything else is imported when the command runs, since the command tree
imports this module.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentmem.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from sqlalchemy import URL

    from agentmem_cli.storage import Place
    from agentmem_sql import SQLAlchemySaver

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A database of LangGraph's SqliteSaver or PostgresSaver, or of ours: its URL, or a SQLite file's path.",
    ),
]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="Where to; tables and SQLite files are made if need be.")]
Threads = Annotated[list[str] | None, typer.Option("--thread", help="Only this one; may be repeated.")]
SourceEncrypted = Annotated[
    bool, typer.Option("--source-encrypted", help="SOURCE is encrypted by the key in LANGGRAPH_AES_KEY.")
]
SourcePrefix = Annotated[str, typer.Option(help="What the names of SOURCE's tables begin with, if it is of ours.")]
SourceSchema = Annotated[str | None, typer.Option(help="Of SOURCE's tables, if it is of ours.")]
SourceKeyFile = Annotated[Path | None, typer.Option(help="Holds the hmac_key of SOURCE, byte by byte.")]
Encrypted = Annotated[bool, typer.Option("--encrypted", help="TARGET is encrypted by the key in LANGGRAPH_AES_KEY.")]
Prefix = Annotated[str, typer.Option(help="What the names of TARGET's tables begin with.")]
Schema = Annotated[str | None, typer.Option(help="Of TARGET's tables; left out, the connection's own.")]
KeyFile = Annotated[Path | None, typer.Option(help="Holds the hmac_key of TARGET, byte by byte.")]


def import_threads(
    source: Source,
    target: Target,
    thread: Threads = None,
    source_encrypted: SourceEncrypted = False,
    source_prefix: SourcePrefix = "agentmem_",
    source_schema: SourceSchema = None,
    source_hmac_key_file: SourceKeyFile = None,
    encrypted: Encrypted = False,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    hmac_key_file: KeyFile = None,
) -> None:
    """Copy threads from another checkpointer's database, unchanged. Run it again to copy what is new.

    Nothing that TARGET already holds is changed. Exits with 1 if some threads could not be copied, and says why.
    """
    from rich.console import Console

    from agentmem_cli.storage import Place
    from agentmem_cli.terminal import error_line
    from agentmem_sql import TransferError, copy_threads

    console = Console()
    there = Place(source, source_prefix, source_schema, source_encrypted, source_hmac_key_file)
    here = Place(target, prefix, schema, encrypted, hmac_key_file)
    with (
        _open(there) as reading,
        _written(here) as writing,
        Console(stderr=True).status("copying") as status,
    ):
        numbers = count(1)
        try:
            report = copy_threads(
                reading,
                writing,
                thread_ids=thread,
                on_thread=lambda _: status.update(f"copying: {next(numbers)} threads"),
            )
        except TransferError as error:
            report = error.report
    for failure in report.failures.values():
        console.print(error_line(failure), soft_wrap=True)
    console.print(
        f"{report.threads} threads, of which {report.skipped} had nothing new and {len(report.failures)} failed; "
        f"copied {report.checkpoints} checkpoints and {report.writes} pending writes",
        highlight=False,
        soft_wrap=True,
    )
    raise typer.Exit(1 if report.failures else 0)


def _written(place: Place) -> SQLAlchemySaver:
    """The saver that is copied to."""
    from agentmem_sql.engines import source_of

    if source_of(place.full_url).in_memory:
        raise StorageError(
            f"expected a TARGET that stays, found {place.url!r}, a database in memory, which ends with this command; "
            "pass the path of a SQLite file or the URL of a server"
        )
    return place.open(make=True)


@contextmanager
def _open(place: Place) -> Iterator[BaseCheckpointSaver[Any]]:
    """The checkpointer whose tables are in a database; LangGraph's, if the database has tables of both."""
    from agentmem_sql.engines import parse

    url = parse(place.full_url)
    backend = url.get_backend_name()
    if backend == "sqlite" and {"checkpoints", "writes"} <= _sqlite_tables(url):
        module = _langgraph("sqlite")
        with _source_errors(sqlite3.Error), module.SqliteSaver.from_conn_string(str(url.database)) as saver:
            saver.serde = place.serde
            yield saver
    elif backend == "postgresql" and (conninfo := _with_langgraph_tables(url)):
        module = _langgraph("postgres")
        with _source_errors(import_module("psycopg").Error), module.PostgresSaver.from_conn_string(conninfo) as saver:
            saver.serde = place.serde
            yield saver
    else:
        with place.open() as ours:
            yield ours


def _sqlite_tables(url: URL) -> set[str]:
    if not url.database or not Path(url.database).is_file():
        return set()
    with _source_errors(sqlite3.Error), closing(sqlite3.connect(url.database)) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _with_langgraph_tables(url: URL) -> str | None:
    """The connection string for psycopg, if the database holds threads of LangGraph's checkpointer."""
    psycopg = import_module("psycopg")
    conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with _source_errors(psycopg.Error), psycopg.connect(conninfo) as connection:
        tables = connection.execute("SELECT to_regclass('checkpoints'), to_regclass('checkpoint_blobs')").fetchone()
    return conninfo if tables is not None and None not in tables else None


@contextmanager
def _source_errors(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        said = " ".join(str(error).split())
        raise StorageError(
            f"the source database answered: {said}; if a table or column is missing, run the setup() of its "
            "checkpointer once, with the version of LangGraph that is installed here"
        ) from error


def _langgraph(name: str) -> Any:
    try:
        return import_module(f"langgraph.checkpoint.{name}")
    except ModuleNotFoundError as error:
        package = f"langgraph-checkpoint-{name}"
        raise ConfigError(f"reading these threads needs the package {package}; run: pip install {package}") from error
