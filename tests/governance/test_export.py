"""An export can be read by others, brings everything back elsewhere, and shows when it was changed."""

from __future__ import annotations

import json
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage, HumanMessage
from safetensors.numpy import load

from agentmem import ConsumedRecord, MemoryState, Message
from agentmem.errors import ConfigError, StorageError
from agentmem_chroma import Fact, FactStore
from agentmem_governance import Governor
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, put


def state(number: int) -> MemoryState:
    record = ConsumedRecord.empty().extend([Message("user", f"{at}") for at in range(number)])
    matrices = np.full((2, 1, 4, 4), number / 3, dtype=np.float32)
    return MemoryState.from_matrices(matrices, record, model_fingerprint="m", adapter_fingerprint="a")


def fill(saver: SQLAlchemySaver, facts: FactStore) -> None:
    at, said = config("ada/1"), list[Any]()
    for number in range(3):
        said += [HumanMessage(f"question {number}", id=f"q{number}"), AIMessage(f"answer {number}", id=f"a{number}")]
        values = {"messages": list(said), "memory": state(number + 1).to_dict(), "pair": (number, b"bytes"), "n": 1.5}
        at = put(saver, at, values, step=number)
        saver.put_writes(at, [("messages", [said[-1]]), ("n", number)], "task")
    put(saver, config("ben/1"), {"messages": [HumanMessage("other", id="o")]})
    facts.add(Fact("Ada likes tea.", source="chat", thread="ada/1", metadata={"page": 3}))
    facts.add(Fact("The handbook says so.", source="handbook"))


def threads(saver: SQLAlchemySaver) -> list[Any]:
    return [
        (each.config, each.checkpoint, each.metadata, each.parent_config, each.pending_writes)
        for each in saver.list(config("ada/1"))
    ]


def test_all_of_it_comes_back_elsewhere(tmp_path: Path, url: str, facts: FactStore) -> None:
    file = tmp_path / "ada.zip"
    with SQLAlchemySaver.from_url(url, audit=True) as saver:
        governor = Governor(saver, facts=facts, actor="support")
        governor.assign("ada", sources=["handbook"])
        fill(saver, facts)
        done = governor.export("ada", file)
        assert (done.threads, done.checkpoints, done.facts) == (1, 3, 2)
        before = threads(saver)
        kept = facts.facts()
        assert [entry.event for entry in governor.audit("ada/1").entries][-1] == "exported"
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    embeddings = DeterministicFakeEmbedding(size=8)
    with (
        SQLAlchemySaver.from_url(elsewhere, audit=True, hmac_key=b"k" * 32) as saver,
        FactStore(tmp_path / "elsewhere", embeddings=embeddings) as store,
    ):
        governor = Governor(saver, facts=store)
        back = governor.restore(file)
        assert (back.subject, back.checkpoints, back.facts) == ("ada", 3, 2)
        assert threads(saver) == before
        assert store.facts() == kept
        assert [(each.name, each.threads, each.facts) for each in governor.subjects()] == [("ada", ("ada/1",), 2)]
        assert governor.restore(file).checkpoints == 0, "once more changes nothing"
        assert threads(saver) == before
        assert governor.audit("ada/1").holds
        assert "imported" in [entry.event for entry in governor.audit("ada/1").entries]


def test_others_can_read_it(tmp_path: Path, url: str, facts: FactStore) -> None:
    with SQLAlchemySaver.from_url(url, audit=True) as saver:
        fill(saver, facts)
        Governor(saver, facts=facts).export("ada", tmp_path / "ada.zip")
    with zipfile.ZipFile(tmp_path / "ada.zip") as archive:
        tensors = load(archive.read("states.safetensors"))
        thread = json.loads(archive.read("threads/0.json"))
        audit = json.loads(archive.read("audit.json"))
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert np.array_equal(tensors[state(2).digest], state(2).matrices)
    assert len(thread["messages"]) == 6
    assert {message["data"]["content"] for message in thread["messages"].values()} >= {"question 0", "answer 2"}
    assert audit["ada/1"]["holds"]
    assert b"other" not in everything


def rewrite(file: Path, other: Path, name: str, content: bytes) -> None:
    """The same export with another part, and the digest of that in its manifest."""
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(other, "w") as written:
        parts = {each: archive.read(each) for each in archive.namelist()} | {name: content}
        manifest = json.loads(parts["manifest.json"])
        manifest["files"][name] = sha256(content).hexdigest()
        for each, part in (parts | {"manifest.json": json.dumps(manifest).encode()}).items():
            written.writestr(each, part)


def test_a_changed_file_is_refused(tmp_path: Path, url: str, facts: FactStore) -> None:
    file, changed = tmp_path / "ada.zip", tmp_path / "changed.zip"
    with SQLAlchemySaver.from_url(url) as saver:
        fill(saver, facts)
        governor = Governor(saver, facts=facts)
        governor.export("ada", file)
        with zipfile.ZipFile(file) as archive, zipfile.ZipFile(changed, "w") as other:
            for name in archive.namelist():
                other.writestr(name, archive.read(name).replace(b"question 1", b"question 9"))
        with pytest.raises(StorageError, match=r"threads/0.json.*changed"):
            governor.restore(changed)
        with pytest.raises(ConfigError, match="found none"):
            Governor(saver).restore(file)
        # Parts that are what their manifest says, and are no parts of an export.
        for name in ("facts.json", "rules.json", "states.json", "threads/0.json"):
            for content in (b"5", b"[5]", b"[[[], 5]]", b"[" * 100_000):
                rewrite(file, changed, name, content)
                with pytest.raises(StorageError, match=r"expected an export|were not copied"):
                    governor.restore(changed)
        changed.write_bytes(b"no zip")
        with pytest.raises(StorageError, match="expected an export"):
            governor.restore(changed)
