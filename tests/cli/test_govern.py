"""`agentmem subjects`, `forget`, `verify`, `audit`, `export` and `import`, as a shell calls them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from langchain_core.messages import HumanMessage
from typer.testing import CliRunner

from agentmem.errors import ConfigError, FactStoreError, StorageError
from agentmem_cli import app as cli
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, put

KEY = b"k" * 32


@pytest.fixture
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two users' threads, with an audit trail, under a key."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_bytes(KEY)
    with SQLAlchemySaver.from_url(f"sqlite:///{tmp_path}/threads.db", audit=True, hmac_key=KEY) as saver:
        for user in ("ada", "ben"):
            at = put(saver, config(f"{user}/1"), {"messages": [HumanMessage(f"I am {user}.", id="1")]})
            put(saver, at, {"messages": [HumanMessage(f"I am {user}.", id="1"), HumanMessage("Bye.", id="2")]})
    return tmp_path / "threads.db"


def run(*arguments: object, db: Path, **options: Any) -> Result:
    where = ["--db", str(db), "--hmac-key-file", "key"]
    return CliRunner().invoke(cli.app, [*map(str, arguments), *where], **options)


def shown(*arguments: object, db: Path, exit_code: int = 0) -> str:
    done = run(*arguments, db=db)
    assert done.exit_code == exit_code, done.output
    return done.stdout


def test_a_subject_goes_with_a_signed_receipt(db: Path) -> None:
    owners = json.loads(shown("subjects", "--json", db=db))
    assert [(owner["name"], owner["threads"]) for owner in owners] == [("ada", ["ada/1"]), ("ben", ["ben/1"])]
    said = shown("forget", "--subject", "ada", "--yes", "--out", "ada.json", "--actor", "support", db=db)
    assert "2 checkpoints" in said
    assert "not reached: backups" in said
    assert [owner["name"] for owner in json.loads(shown("subjects", "--json", db=db))] == ["ben"]
    assert "signature: valid\naudit trail: the same receipt\nnothing is back" in shown("verify", "ada.json", db=db)
    receipt = json.loads(Path("ada.json").read_text())
    assert receipt["actor"] == "support"
    receipt["actor"] = "nobody"
    Path("ada.json").write_text(json.dumps(receipt))
    assert "signature: invalid" in shown("verify", "ada.json", db=db, exit_code=1)
    assert "owns nothing" in shown("forget", "--subject", "ada", "--yes", db=db, exit_code=1)


def test_a_public_key_checks_a_receipt_without_a_database(db: Path) -> None:
    made = Ed25519PrivateKey.generate()
    private = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    Path("receipts.pem").write_bytes(private)
    Path("receipts.pub").write_bytes(public)
    key = ["--receipt-key-file", "receipts.pem"]
    shown("forget", "--subject", "ada", "--yes", "--out", "ada.json", *key, db=db)
    key = ["--receipt-key-file", "receipts.pub"]
    assert "signature: valid\naudit trail: the same receipt\nnothing is back" in shown(
        "verify", "ada.json", *key, db=db
    )
    alone = ["verify", "ada.json", "--signature-only", *key]
    assert CliRunner().invoke(cli.app, alone).stdout == "signature: valid\n"
    receipt = json.loads(Path("ada.json").read_text())
    Path("ada.json").write_text(json.dumps({**receipt, "actor": "nobody"}))
    done = CliRunner().invoke(cli.app, alone)
    assert (done.exit_code, done.stdout) == (1, "signature: invalid\n")


def test_it_asks_first(db: Path) -> None:
    assert run("forget", "--subject", "ada", db=db, input="n\n").exit_code == 1
    assert len(json.loads(shown("subjects", "--json", db=db))) == 2
    for wrong in ((), ("--subject", "a", "--message", "m"), ("--subject", "a", "--thread", "t"), ("--message", "m")):
        assert run("forget", *wrong, db=db).exit_code == 2


def test_a_message_goes(db: Path) -> None:
    assert "checkpoints" in shown("forget", "--thread", "ada/1", "--message", "2", "--yes", db=db)
    with SQLAlchemySaver.from_url(f"sqlite:///{db}", hmac_key=KEY) as saver:
        newest = saver.get_tuple(config("ada/1"))
    assert newest is not None
    assert [message.id for message in newest.checkpoint["channel_values"]["messages"]] == ["1"]


def test_the_audit_trail_is_shown_and_checked(db: Path, tmp_path: Path) -> None:
    trail = json.loads(shown("audit", "--thread", "ada/1", "--json", db=db))
    assert [entry["event"] for entry in trail["entries"]] == ["written", "written"]
    assert "the chain holds" in shown("audit", "--thread", "ada/1", db=db)
    connection = sqlite3.connect(db)
    with connection:
        connection.execute("DELETE FROM agentmem_audit WHERE seq = 2")
    connection.close()
    assert "does not hold" in shown("audit", "--thread", "ada/1", db=db, exit_code=1)


def test_export_and_import(db: Path, tmp_path: Path) -> None:
    assert "2 checkpoints" in shown("export", "--subject", "ada", "--out", "ada.zip", db=db)
    assert "2 checkpoints" in shown("import", "ada.zip", db=tmp_path / "elsewhere.db")
    assert [each["name"] for each in json.loads(shown("subjects", "--json", db=tmp_path / "elsewhere.db"))] == ["ada"]


def test_stores_that_are_not_there_are_not_made(db: Path, tmp_path: Path) -> None:
    for nowhere in ("nowhere", "localhost:8000"):
        done = run("subjects", "--facts", nowhere, db=db)
        assert isinstance(done.exception, ConfigError), done.output
        assert "http://HOST:PORT" in str(done.exception)
    done = run("forget", "--subject", "ada", "--yes", "--facts", "http://127.0.0.1:9", db=db)
    assert isinstance(done.exception, FactStoreError), "a server's address is no directory"
    assert "no Chroma server answers at http://127.0.0.1:9" in str(done.exception)
    assert len(json.loads(shown("subjects", "--json", db=db))) == 2
    assert isinstance(run("subjects", db=tmp_path / "none.db").exception, StorageError)
    assert not (tmp_path / "none.db").exists()
    assert not (tmp_path / "nowhere").exists()
