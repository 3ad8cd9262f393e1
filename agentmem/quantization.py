"""Which library quantises a model's weights as they are loaded, and how.

The base model alone is quantised. The memory's own weights, its state and its arithmetic stay as they are, and the
model's fingerprint, which leaves quantised weights out, stays the same: states move between the forms of one model.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from agentmem.errors import ConfigError, install_hint


def quantization_config(wanted: Any, dtype: str | torch.dtype) -> Any:
    """The config that transformers takes.

    Args:
        wanted: "4bit" (NF4 by bitsandbytes, else int4 weights by torchao), "8bit" (LLM.int8 by bitsandbytes, else int8
            weights by torchao), or a config of transformers, which is given back.
        dtype: that of the arithmetic; "auto" = bfloat16.

    Raises:
        ConfigError: another word, or neither library is installed.
    """
    if not isinstance(wanted, str):
        return wanted
    if wanted not in ("4bit", "8bit"):
        raise ConfigError(f"quantize takes '4bit', '8bit' or a quantisation config of transformers; found {wanted!r}")
    if find_spec("bitsandbytes") is not None:
        return _bitsandbytes(wanted, dtype)
    # Its int4 kernels are a package of their own.
    if find_spec("torchao") is not None and (wanted == "8bit" or find_spec("mslk") is not None):
        return _torchao(wanted)
    raise ConfigError(
        f"quantize={wanted!r} needs bitsandbytes (or torchao, with mslk for 4 bits), which is not installed; "
        f"{install_hint('quant')}"
    )


def _bitsandbytes(wanted: str, dtype: str | torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if wanted == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _torchao(wanted: str) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if wanted == "8bit" else Int4WeightOnlyConfig())
