"""The savers that ``checkpointers.py`` compares, each opened as its documentation says, on databases of their own."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import URL, Engine, NullPool, Pool, create_engine, event, make_url, text
from sqlalchemy.exc import SQLAlchemyError

SQLITE, POSTGRES, MARIADB = "SQLite", "PostgreSQL", "MariaDB"
OURS = "SQLAlchemySaver"


@dataclass(frozen=True)
class Contender:
    """A saver on a database. ``form`` says how its connections are made where LangGraph offers a choice."""

    saver: str
    database: str
    form: str = ""

    @property
    def ours(self) -> bool:
        return self.saver == OURS

    @property
    def installed(self) -> bool:
        return find_spec(PACKAGES[self.saver]) is not None

    def __str__(self) -> str:
        return ", ".join(part for part in (self.saver, self.database, self.form) if part)


SINGLE, POOL = "one connection", "a pool"
ALONE = (
    Contender("SqliteSaver", SQLITE),
    Contender(OURS, SQLITE),
    Contender("PostgresSaver", POSTGRES, SINGLE),
    Contender(OURS, POSTGRES),
    Contender(OURS, MARIADB),
)
# With many threads PostgresSaver is given both forms, and the better one counts.
TOGETHER = (*ALONE[:2], Contender("PostgresSaver", POSTGRES, POOL), *ALONE[2:])
# What the databases are asked about the safety of a commit.
COMMIT_SETTINGS = {
    SQLITE: "PRAGMA synchronous",
    POSTGRES: "SHOW synchronous_commit",
    MARIADB: "SELECT @@innodb_flush_log_at_trx_commit",
}
PACKAGES = {
    "SqliteSaver": "langgraph.checkpoint.sqlite",
    "PostgresSaver": "langgraph.checkpoint.postgres",
    OURS: "agentmem_sql",
}


@dataclass(frozen=True)
class Servers:
    """Where databases are made: a folder for SQLite's files, and the servers that answered."""

    folder: Path
    urls: Mapping[str, URL]

    def has(self, contender: Contender) -> bool:
        return contender.database == SQLITE or contender.database in self.urls

    @contextmanager
    def database(self, kind: str) -> Iterator[URL]:
        """An empty database, gone afterwards."""
        name = f"agentmem_bench_{uuid4().hex[:12]}"
        if kind == SQLITE:
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=name) as folder:
                yield URL.create("sqlite", database=str(Path(folder) / "threads.db"))
            return
        run(self.urls[kind], f"CREATE DATABASE {name}")
        try:
            yield self.urls[kind].set(database=name)
        finally:
            run(self.urls[kind], f"DROP DATABASE {name}" + " WITH (FORCE)" * (kind == POSTGRES))


def answering(addresses: Mapping[str, str]) -> tuple[dict[str, URL], list[str]]:
    """The servers that can be used, and a line for each that cannot. An empty address leaves a server out."""
    urls, lines = {}, []
    for database, address in addresses.items():
        try:
            if not address:
                raise ValueError("not asked for")
            urls[database] = make_url(address)
            run(urls[database], "SELECT 1")
        except (SQLAlchemyError, ImportError, ValueError) as error:
            urls.pop(database, None)
            lines.append(f"{database} is left out: {str(error).strip().splitlines()[0]}")
    return urls, lines


def administrator(url: URL) -> Engine:
    return create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")


def run(url: URL, *statements: str) -> list[Any]:
    """Run statements one by one, outside any transaction; the rows of the last."""
    with administrator(url).connect() as connection:
        for statement in statements[:-1]:
            connection.execute(text(statement))
        last = connection.execute(text(statements[-1]))
        return list(last.all()) if last.returns_rows else []


def size(url: URL) -> int:
    """What a database takes, indexes included; a SQLite file as a vacuum leaves it, without touching the file."""
    kind = url.get_backend_name()
    if kind == "sqlite":
        packed = Path(f"{url.database}.packed")
        run(url, f"VACUUM INTO '{packed}'")
        taken = packed.stat().st_size
        packed.unlink()
        return taken
    if kind == "postgresql":
        return int(run(url, "SELECT sum(pg_total_relation_size(relid)) FROM pg_stat_user_tables")[0][0])
    names = [f"`{name}`" for (name,) in run(url, "SHOW TABLES")]
    total = "SELECT sum(data_length + index_length) FROM information_schema.tables WHERE table_schema = DATABASE()"
    return int(run(url, f"ANALYZE TABLE {', '.join(names)}", total)[0][0])


def saver_class(contender: Contender) -> Any:
    """The class, with everything imported that its first call would import."""
    if contender.saver == "SqliteSaver":
        from langgraph.checkpoint.sqlite import SqliteSaver

        return SqliteSaver
    if contender.saver == "PostgresSaver":
        from langgraph.checkpoint.postgres import PostgresSaver

        return PostgresSaver
    from agentmem_sql import SQLAlchemySaver

    return SQLAlchemySaver


@contextmanager
def opened(contender: Contender, url: URL, connections: int = 1) -> Iterator[Any]:
    """A saver as its documentation opens it, its tables made."""
    kind = saver_class(contender)
    plain = url.set(drivername=url.get_backend_name()).render_as_string(hide_password=False)
    with ExitStack() as stack:
        if contender.saver == "SqliteSaver":
            saver = stack.enter_context(kind.from_conn_string(url.database))
        elif contender.form == POOL:
            from psycopg.rows import dict_row
            from psycopg_pool import ConnectionPool

            settings = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
            pool = ConnectionPool(plain, min_size=connections, max_size=connections, kwargs=settings, open=False)
            stack.enter_context(pool)
            pool.wait()
            saver = kind(pool)
        elif contender.saver == "PostgresSaver":
            saver = stack.enter_context(kind.from_conn_string(plain))
        else:
            saver = stack.enter_context(kind.from_url(url))
        saver.setup()
        yield saver


def at_commit(contender: Contender, servers: Servers) -> str:
    """The database's setting for commits as the saver's own connection has it."""
    question = COMMIT_SETTINGS[contender.database]
    answers = []

    def ask(connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute(question)
        row = cursor.fetchone()
        answers.append(next(iter(row.values())) if isinstance(row, dict) else row[0])
        connection.rollback()

    # A saver of SQLAlchemy's is asked when it gives a connection back to its pool.
    event.listen(Pool, "checkin", ask)
    try:
        with servers.database(contender.database) as url, opened(contender, url) as saver:
            if not contender.ours:
                ask(saver.conn)
    finally:
        event.remove(Pool, "checkin", ask)
    return f"{question.split()[-1].lstrip('@')} = {answers[-1] if answers else 'unknown'}"


def versions(servers: Servers) -> list[str]:
    """What the databases are, and how they keep what is committed."""
    lines = [f"SQLite {sqlite3.sqlite_version}"]
    if POSTGRES in servers.urls:
        asked = ("server_version", "fsync", "full_page_writes", "wal_sync_method", "shared_buffers")
        answers = [run(servers.urls[POSTGRES], f"SHOW {name}")[0][0] for name in asked]
        settings = ", ".join(f"{name}={value}" for name, value in zip(asked[1:], answers[1:], strict=True))
        lines.append(f"PostgreSQL {answers[0].split()[0]} ({settings})")
    if MARIADB in servers.urls:
        asked = ("version", "innodb_flush_method", "log_bin", "sync_binlog", "innodb_buffer_pool_size")
        (answers,) = run(servers.urls[MARIADB], f"SELECT {', '.join(f'@@{name}' for name in asked)}")
        settings = ", ".join(f"{name}={value}" for name, value in zip(asked[1:], answers[1:], strict=True))
        lines.append(f"MariaDB {answers[0].split('-')[0]} ({settings})")
    return lines
