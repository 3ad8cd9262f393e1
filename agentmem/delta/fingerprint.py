"""Fingerprints, which tell whether two loaded models are the same, and digests of saved model directories.

Two loaded copies of one model have the same fingerprint, whatever their path, dtype, device or kernels. It has two
parts, separated by a dot, and covers the architecture and the sizes in each:

- The signs of a fixed sample of embedding rows, and of the norms. Digits change when weights are rounded to bfloat16,
  to float16 or to both in turn, but signs do not; and two models that were trained separately differ in half of them.
- The norms' weights as bfloat16. Formats that round all matrices, embeddings too (GGUF), keep the norms, so this part
  is the same in every format of a model that was published in bfloat16 or float16. It is left out where the norms are
  all alike, as in a model that was not trained.

Models are the same where one part is (`agentmem.state.same_model`). The size of the vocabulary does not count, so that
tokens may be added. A fingerprint is not a checksum: it does not change with a weight that is not sampled. For the
model directories that agentmem makes, there are digests of the files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentmem.errors import ModelNotFoundError
from agentmem.text import parse_json

DIGESTS_FILE = "agentmem_sha256.json"

# Sizes that change what a state means. Everything else in a config (paths, caches, kernels) may differ.
_SIZES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_ROWS, _APART = 512, 32  # how many embedding rows are sampled, and the distance between them
_COLUMNS = 128  # columns sampled in each row, spread over its width
_SMALLEST = 2.0**-16  # float16 has all digits of a bfloat16 from here up


def model_fingerprint(model: Any) -> str:
    """What identifies a model: two SHA-256 (hex) with a dot between, or only the first (see above)."""
    config = model.config.get_text_config()
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    header = json.dumps(sizes, sort_keys=True).encode()
    embedding = model.get_input_embeddings().weight
    columns = torch.linspace(0, embedding.shape[1] - 1, min(_COLUMNS, embedding.shape[1])).long()
    samples = {"embedding": embedding[: _ROWS * _APART : _APART][:, columns.to(embedding.device)]}
    norms = {n: p.detach().cpu() for n, p in model.get_decoder().named_parameters() if p.dim() == 1 and "norm" in n}
    signs = hashlib.sha256(header)
    for name, sample in sorted((samples | norms).items()):
        bits = torch.signbit(sample.detach()).cpu()
        signs.update(f"\n{name} {list(bits.shape)}\n".encode())
        signs.update(np.packbits(bits.numpy()).tobytes())
    digits = hashlib.sha256(b"norms\n" + header)
    rounded = {name: _as_bfloat16(norm) for name, norm in norms.items()}
    for name, numbers in sorted(rounded.items()):
        digits.update(f"\n{name} {list(numbers.shape)}\n".encode())
        digits.update(numbers.view(torch.uint8).numpy().tobytes())
    alike = all(bool((numbers == numbers[0]).all()) for numbers in rounded.values())
    return signs.hexdigest() if alike else f"{signs.hexdigest()}.{digits.hexdigest()}"


def _as_bfloat16(weights: torch.Tensor) -> torch.Tensor:
    """The weights as bfloat16, with those set to 0 that float16 cannot hold with as many digits."""
    weights = weights.float()
    return torch.where(weights.abs() < _SMALLEST, 0.0, weights).bfloat16()


def write_digests(directory: str | Path) -> None:
    """Record the SHA-256 (hex) of each file in a model's directory, by name."""
    directory = Path(directory)
    files = sorted(file for file in directory.iterdir() if file.is_file() and file.name != DIGESTS_FILE)
    digests = {file.name: _file_digest(file) for file in files}
    (directory / DIGESTS_FILE).write_text(json.dumps(digests, indent=2) + "\n", "utf-8")


def check_digests(directory: str | Path) -> None:
    """Compare a model's directory with the recorded digests, if there are any.

    Raises:
        ModelNotFoundError: a file is missing or has another content.
    """
    note = Path(directory) / DIGESTS_FILE
    if not note.is_file():
        return
    try:
        digests = dict(parse_json(note.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelNotFoundError(f"{note} cannot be read ({error}); fetch the model again") from error
    for name, digest in digests.items():
        file = Path(directory) / name
        found = _file_digest(file) if file.is_file() else None
        if found != digest:
            raise ModelNotFoundError(
                f"the model at {str(directory)!r} is damaged, or was changed since it was made: {name} "
                f"{'is missing' if found is None else 'has another content'}; fetch it again (or, if you changed it, "
                f"delete {DIGESTS_FILE})"
            )


def _file_digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
