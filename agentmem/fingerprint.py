"""Says whether two loaded models are the same model, whatever their path, dtype, device or attention kernel.

The fingerprint covers architecture, sizes and a fixed sample of the weights that quantisation leaves alone (norms and
embedding rows), rounded to bfloat16, which every loading dtype in use keeps.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

# Sizes that change what a state means; everything else of a config (paths, caches, kernels) may differ.
_SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_ROWS = 64  # embedding rows and columns sampled, spread over vocabulary and width
_VALUES = 4096  # numbers taken from each sampled tensor


def model_fingerprint(model: Any) -> str:
    """SHA-256 (hex) of what makes this model this model."""
    config = model.config.get_text_config()
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    embedding = model.get_input_embeddings().weight
    rows = torch.linspace(0, embedding.shape[0] - 1, min(_ROWS, embedding.shape[0])).long()
    columns = torch.linspace(0, embedding.shape[1] - 1, min(_ROWS, embedding.shape[1])).long()
    samples = {"embedding": embedding[rows.to(embedding.device)][:, columns.to(embedding.device)]}
    samples |= {n: p for n, p in model.get_decoder().named_parameters() if p.dim() == 1 and "norm" in n}
    for name in sorted(samples):
        values = samples[name].detach().flatten()[:_VALUES].to("cpu", torch.bfloat16)
        digest.update(f"\n{name} {list(samples[name].shape)}\n".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
