"""Fingerprints, which tell whether two loaded models are the same, and digests of saved model directories.

Fingerprints are equal for two loaded copies of one model, whatever their path, dtype, device or kernels. A fingerprint
covers the architecture, the sizes, and the signs of a fixed sample of weights that quantisation leaves alone (embedding
rows and norms). Digits change when weights are rounded to bfloat16, to float16 or to both in turn, but signs do not;
and two models that were trained separately differ in half of the signs. The size of the vocabulary does not count, so
that tokens may be added. It is not a checksum: it does not change with a digit of a weight, or with a weight that is
not sampled. For the model directories that agentmem makes, there are digests of the files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentmem.errors import ModelNotFoundError

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


def model_fingerprint(model: Any) -> str:
    """SHA-256 (hex) of what identifies a model."""
    config = model.config.get_text_config()
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    embedding = model.get_input_embeddings().weight
    columns = torch.linspace(0, embedding.shape[1] - 1, min(_COLUMNS, embedding.shape[1])).long()
    samples = {"embedding": embedding[: _ROWS * _APART : _APART][:, columns.to(embedding.device)]}
    samples |= {n: p for n, p in model.get_decoder().named_parameters() if p.dim() == 1 and "norm" in n}
    for name in sorted(samples):
        signs = torch.signbit(samples[name].detach()).cpu()
        digest.update(f"\n{name} {list(signs.shape)}\n".encode())
        digest.update(np.packbits(signs.numpy()).tobytes())
    return digest.hexdigest()


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
        digests = dict(json.loads(note.read_text("utf-8")))
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
