"""Fingerprints of models: equal for two loaded copies of one model, whatever their path, dtype, device or kernels.

The fingerprint covers the architecture, the sizes, and the signs of a fixed sample of weights that quantisation leaves
alone (embedding rows and norms). Digits change when weights are rounded to bfloat16, to float16 or to both in turn, but
signs do not; and two models that were trained separately differ in half of the signs. The size of the vocabulary does
not count, so that tokens may be added.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch

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
