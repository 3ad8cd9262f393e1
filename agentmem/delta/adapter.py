"""Reads and writes adapter directories, in the authors' format and in our own.

    <dir>/delta_mem_config.json      MemoryConfig, in both formats; in ours with a digest of all that the adapter holds
    <dir>/adapter.safetensors        the weights in our format
    <dir>/delta_mem_adapter.pt       the weights in the authors' format, read by torch's restricted loader
                                     (`weights_only=True`)

Tensors are named `model.layers.N.self_attn.<param>` with the parameters of `layer.LayerMemory`,
whatever the model calls its own modules. Everything is checked before anything is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agentmem.delta.config import CONFIG_FILE, DIGEST_KEY, MemoryConfig, read_config
from agentmem.delta.fingerprint import model_fingerprint
from agentmem.delta.layer import LayerMemory
from agentmem.errors import AdapterError
from agentmem.state import same_model

SAFETENSORS_FILE = "adapter.safetensors"
AUTHORS_FILE = "delta_mem_adapter.pt"

_BASE = "base_model_fingerprint"  # in the header of our weights file
_KEY = re.compile(r"model\.layers\.(\d+)\.self_attn\.(\w+)")


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        config: the mechanism's options.
        tensors: the weights, by the names they have in the file.
        base: the fingerprint of the model that the adapter was made for. None where the file does not record it,
            which the authors' files never do. It is stored in the header of our weights file and is not part of the
            adapter's own fingerprint.
    """

    config: MemoryConfig
    tensors: Mapping[str, Tensor]
    base: str | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over every json field and every tensor (name, dtype, shape, bytes)."""
        digest = hashlib.sha256(json.dumps(self.config.to_json(), sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu()
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the fingerprint and `base`: adapters in our format are checked against it."""
        return hashlib.sha256(f"{self.fingerprint}\n{self.base}".encode()).hexdigest()

    def rounded(self, dtype: torch.dtype) -> Adapter:
        """The adapter with its weights in another dtype, as a file of that dtype would give it back."""
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})


def load_adapter(directory: str | Path) -> Adapter:
    """Read an adapter directory in either format; where both are present, ours is read.

    Raises:
        ConfigError: the json is missing, or asks for something that agentmem does not implement.
        AdapterError: the weights are missing, unreadable, or hold anything but named tensors; or weights and json do
            not match the digest in the json.
    """
    directory = Path(directory)
    body = read_config(directory)
    config = MemoryConfig.from_json(body)
    ours, theirs = directory / SAFETENSORS_FILE, directory / AUTHORS_FILE
    path = ours if ours.exists() else theirs
    if not path.exists():
        raise AdapterError(f"{directory} holds neither {SAFETENSORS_FILE} nor {AUTHORS_FILE}")
    tensors: Any
    base: str | None = None
    try:
        if path == ours:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                base = (file.metadata() or {}).get(_BASE)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler meets damaged bytes with errors of any kind
        raise AdapterError(f"the adapter weights in {path} cannot be read: {error}") from error
    adapter = Adapter(config, _checked(path, tensors), base)
    if DIGEST_KEY in body and body[DIGEST_KEY] != (digest := adapter.digest):
        raise AdapterError(
            f"{directory} is damaged, or was changed since it was saved: the digest in {CONFIG_FILE} is "
            f"{body[DIGEST_KEY]!r}, found {digest}; fetch it again (or, if you changed it, take {DIGEST_KEY!r} out)"
        )
    return adapter


def _checked(path: Path, tensors: Any) -> dict[str, Tensor]:
    """The tensors, if all of them are plain floating-point tensors under the names that adapters use."""
    if not isinstance(tensors, dict):
        raise AdapterError(f"{path} must hold a dict of tensors; found {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and _KEY.fullmatch(name) and isinstance(tensor, Tensor)):
            raise AdapterError(
                f"{path}: entry {name!r} ({type(tensor).__name__}) is not a tensor named "
                "model.layers.N.self_attn.<param>"
            )
        if not (tensor.is_floating_point() and tensor.layout == torch.strided and tensor.device.type == "cpu"):
            raise AdapterError(
                f"{path}: {name} must hold plain floating-point numbers; found {tensor.dtype}, "
                f"{tensor.layout}, on {tensor.device.type}"
            )
    return tensors


def save_adapter(
    directory: str | Path, adapter: Adapter, *, format: Literal["safetensors", "authors"] = "safetensors"
) -> None:
    """Write an adapter directory. The weights and the json each replace the old file in one step, the weights first.

    Raises:
        AdapterError: the authors' format was requested and the directory holds an `adapter.safetensors`, which
            loading would prefer.
        OSError: the directory cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if format == "authors" and (directory / SAFETENSORS_FILE).exists():
        raise AdapterError(
            f"{directory} holds an {SAFETENSORS_FILE}, which would be loaded in place of {AUTHORS_FILE}; "
            "save to another directory"
        )
    # Copies: tensors that share memory would be refused, or written more than once.
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in adapter.tensors.items()
    }
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        target = SAFETENSORS_FILE if format == "safetensors" else AUTHORS_FILE
        if format == "safetensors":
            metadata = None if adapter.base is None else {_BASE: adapter.base}
            save_file(tensors, Path(scratch) / target, metadata=metadata)
        else:
            torch.save(tensors, Path(scratch) / target)
        body = adapter.config.to_json()
        if format == "safetensors":  # the authors' code accepts no unknown key
            body[DIGEST_KEY] = adapter.digest
        (Path(scratch) / CONFIG_FILE).write_text(json.dumps(body, indent=2) + "\n", "utf-8")
        for name in (target, CONFIG_FILE):
            os.replace(Path(scratch) / name, directory / name)


def fill(memory: Sequence[LayerMemory], layers: Sequence[int], adapter: Adapter) -> None:
    """Copy an adapter's tensors into the memory of the given layers, after checking every name and shape.

    Raises:
        AdapterError: a tensor is missing, unknown, misshaped or not finite; nothing is copied then.
    """
    parameters: dict[str, nn.Parameter] = {}
    optional: set[str] = set()
    for layer, module in zip(layers, memory, strict=True):
        for name, parameter in module.named_parameters():
            key = f"model.layers.{layer}.self_attn.{name}"
            parameters[key] = parameter
            if name in module.idle:
                optional.add(key)
    missing = sorted(parameters.keys() - adapter.tensors.keys() - optional)
    if missing:
        raise AdapterError(_listed("the adapter lacks", missing, "the config and this model need them"))
    foreign = sorted(k for k in adapter.tensors.keys() - parameters.keys() if not _idle(k, adapter.config))
    if foreign:
        raise AdapterError(_listed("the adapter holds", foreign, "this model or the config has no place for them"))
    fitting = {key: parameter for key, parameter in parameters.items() if key in adapter.tensors}
    for key, parameter in fitting.items():
        tensor = adapter.tensors[key]
        # A single number may be stored with or without a dimension.
        if tensor.shape != parameter.shape and not tensor.numel() == parameter.numel() == 1:
            raise AdapterError(
                f"{key} has shape {list(tensor.shape)}, this model and config need {list(parameter.shape)}: "
                "the adapter was made for another model size or another rank"
            )
        if not tensor.isfinite().all():
            raise AdapterError(f"{key} holds numbers that are not finite; the file is damaged")
    with torch.no_grad():
        for key, parameter in fitting.items():
            parameter.copy_(adapter.tensors[key].reshape(parameter.shape))


def collect(memory: Sequence[LayerMemory], layers: Sequence[int], config: MemoryConfig) -> Adapter:
    """The adapter as it is in the model now: copies of its parameters under their names in a file."""
    tensors = {
        f"model.layers.{layer}.self_attn.{name}": parameter.detach().clone()
        for layer, module in zip(layers, memory, strict=True)
        for name, parameter in module.named_parameters()
    }
    return Adapter(config, tensors)


def _idle(key: str, config: MemoryConfig) -> bool:
    """Whether a tensor is a lambda weight that this config does not use; a file may hold it all the same."""
    unused = config.state_update_mode == "no_lambda" or config.couple_lambda
    return unused and key.rsplit(".", 1)[-1] in ("lambda_proj", "lambda_bias")


def _listed(what: str, names: list[str], why: str) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}; {why}"


def need_base(adapter: Adapter | None, model: Any) -> None:
    """Refuse an adapter that records another model as its base: its shapes might fit, but it would steer at random."""
    if adapter is None or adapter.base is None:
        return
    fingerprint = model_fingerprint(model)
    if not same_model(adapter.base, fingerprint):
        raise AdapterError(
            f"the adapter was made for the model of fingerprint {adapter.base}, this model's is {fingerprint}; "
            "load the model that it was trained on, or an adapter that was trained for this one"
        )
