"""`agentmem inspect`, as a shell calls it; the server itself is not run."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient
from typer.testing import CliRunner

from agentmem.errors import ConfigError, StorageError
from agentmem_cli import app as cli
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, put


@pytest.fixture
def db(tmp_path: Path) -> Path:
    with SQLAlchemySaver.from_url(f"sqlite:///{tmp_path}/threads.db", audit=True) as saver:
        put(saver, config("ada/1"), {"messages": []})
    return tmp_path / "threads.db"


def test_the_printed_address_opens_the_page_on_this_machine_alone(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[str, Any]] = []

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        socket.create_connection(sockets[0].getsockname()).close()  # the address is printed by now, and answers
        host = "{}:{}".format(*sockets[0].getsockname())
        with TestClient(server.config.app, base_url=f"http://{host}") as client:
            served.append((host, client))
            assert client.get("/").status_code == 403
        assert not server.config.access_log

    monkeypatch.setattr(uvicorn.Server, "run", run)
    done = CliRunner().invoke(cli.app, ["inspect", "--db", str(db), "--actor", "support"])
    assert done.exit_code == 0, done.output
    address = done.stdout.split()[0]
    host, _ = served[0]
    assert host.startswith("127.0.0.1:")
    assert address.startswith(f"http://{host}/?token=")
    assert len(address.partition("token=")[2]) > 40


def test_what_cannot_be_opened_is_refused(db: Path, tmp_path: Path) -> None:
    missing = CliRunner().invoke(cli.app, ["inspect", "--db", str(tmp_path / "none.db")])
    assert isinstance(missing.exception, StorageError)
    assert not (tmp_path / "none.db").exists()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = CliRunner().invoke(cli.app, ["inspect", "--db", str(db), "--port", str(port)])
    assert isinstance(refused.exception, ConfigError)
    assert str(port) in str(refused.exception)
