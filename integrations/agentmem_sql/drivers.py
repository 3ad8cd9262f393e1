"""Database URLs: which databases and drivers there are, and which driver serves the other mode.

A URL may name a driver or leave it to us (``postgresql://``). Two URLs come of it, one for the synchronous
driver and one for the asynchronous. Nothing is opened or imported here.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from agentmem.errors import StorageError

BACKENDS = ("sqlite", "postgresql", "mysql")


@dataclass(frozen=True)
class Backend:
    """A kind of database: its name, its drivers as URLs name them, and the extra that installs them."""

    name: str
    sync: str
    asynchronous: tuple[str, ...]  # the first one is taken where the URL names none
    extra: str

    def __contains__(self, driver: str) -> bool:
        return driver == self.sync or driver in self.asynchronous


@dataclass(frozen=True)
class Drivers:
    """One database by both drivers."""

    backend: Backend
    sync: URL
    asynchronous: URL


_SQLITE = Backend("sqlite", sync="pysqlite", asynchronous=("aiosqlite",), extra="sql")
_POSTGRESQL = Backend("postgresql", sync="psycopg", asynchronous=("psycopg", "asyncpg"), extra="postgres")
_MYSQL = Backend("mysql", sync="pymysql", asynchronous=("asyncmy",), extra="mysql")
_BACKENDS = {"sqlite": _SQLITE, "postgresql": _POSTGRESQL, "mysql": _MYSQL, "mariadb": _MYSQL}

# Other spellings: of the database, which hosting services still use, and of SQLAlchemy for psycopg in tasks.
_SPELLINGS = {"postgres": "postgresql", "postgresql+psycopg_async": "postgresql+psycopg"}

_INSTEAD = {
    "psycopg2": "psycopg2 has no asynchronous mode; use psycopg (version 3), which has both",
    "aiomysql": "aiomysql fails on bytes with PyMySQL 1.2.3 and later; use asyncmy",
    "mysqldb": "use pymysql, which needs no compiler",
    "pg8000": "use psycopg",
}

# What psycopg (libpq) and asyncpg call the same option.
_LIBPQ_TO_ASYNCPG = {"sslmode": "ssl"}
_ASYNCPG_TO_LIBPQ = {"ssl": "sslmode"}


def parse(url: URL | str) -> URL:
    """The URL of a database that can be used here, as SQLAlchemy spells it.

    Raises:
        StorageError: it cannot be read, or names a database or a driver that this version does not speak.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:  # ValueError: a port that is no number
        raise StorageError(
            "expected a database URL such as 'sqlite:///threads.db' (three slashes, then the path) or "
            f"'postgresql://user@host/database', found one that cannot be read: {error}"
        ) from error
    parsed = parsed.set(drivername=_SPELLINGS.get(parsed.drivername, parsed.drivername))
    name, _, driver = parsed.drivername.partition("+")
    backend = _BACKENDS.get(name)
    if backend is None or (driver and driver not in backend):
        known = "sqlite, postgresql, mysql or mariadb" if backend is None else _spelled(name, backend)
        raise StorageError(
            f"expected a URL that begins with {known}, found {parsed.drivername!r}, which this version cannot use"
            + (f": {_INSTEAD[driver]}" if driver in _INSTEAD else "")
        )
    return parsed


def drivers(url: URL) -> Drivers:
    """Both drivers for the database of a URL that ``parse`` gave (or that an engine has).

    Raises:
        StorageError: as ``parse``.
    """
    url = parse(url)
    name, _, driver = url.drivername.partition("+")
    backend = _BACKENDS[name]
    asynchronous = driver if driver in backend.asynchronous else backend.asynchronous[0]
    if backend is _MYSQL and "charset" not in url.query:
        url = url.update_query_dict({"charset": "utf8mb4"})
    return Drivers(
        backend=backend,
        sync=_with_driver(url, name, backend.sync),
        asynchronous=_with_driver(url, name, asynchronous),
    )


def spelled(url: URL) -> str:
    """A URL without what may be secret: a password, and options, which may hold one as well."""
    return url.set(query={}).render_as_string(hide_password=True)


def is_memory(url: URL) -> bool:
    """Whether a URL names a SQLite database without a file."""
    name = url.database or ""
    return url.get_backend_name() == "sqlite" and (
        name in ("", ":memory:") or name.startswith("file::memory:") or url.query.get("mode") == "memory"
    )


def _with_driver(url: URL, name: str, driver: str) -> URL:
    spelling = {}
    if name == "postgresql":
        spelling = _LIBPQ_TO_ASYNCPG if driver == "asyncpg" else _ASYNCPG_TO_LIBPQ
    query = {spelling.get(key, key): value for key, value in url.query.items()}
    return url.set(drivername=f"{name}+{driver}", query=query)


def _spelled(name: str, backend: Backend) -> str:
    drivers = dict.fromkeys((backend.sync, *backend.asynchronous))
    return " or ".join(f"{name}+{driver}" for driver in drivers)
