"""Loads a model, its tokenizer and its adapter into an engine: the embedded one, a directory, or a hub id.

Nothing that comes with a model is executed unless the caller says so (``trust_remote_code``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from agentmem.delta.config import CONFIG_FILE
from agentmem.delta.model import SteeredModel
from agentmem.engine import Engine
from agentmem.errors import AdapterError, ConfigError, MissingAdapterError, ModelNotFoundError, install_hint
from agentmem.quantization import quantization_config

NANO = Path(__file__).parent / "nano" / "weights"


def load(
    model: str | Path = "nano",
    adapter: str | Path | Literal[False] | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
    *,
    revision: str | None = None,
    adapter_revision: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantize: Literal["4bit", "8bit"] | Any = None,
    trust_remote_code: bool = False,
    template_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    kv_cache_tokens: int = 8192,
    max_batch: int = 64,
) -> Engine:
    """Load an engine.

    Args:
        model: "nano" (the embedded model), a directory, or a hub id. Local files are used where they are there.
        adapter: a directory or a hub id; None = the one in the model's ``adapter`` folder; False = no memory.
        device: "auto" = CUDA, then Apple's, then the CPU.
        dtype: "auto" = float32 on a CPU, else the dtype that the weights are stored in.
        attn_implementation: "auto" = flash_attention_2 where flash-attn is installed and the device can, else sdpa.
        revision, adapter_revision: branch, tag or commit on the hub.
        device_map: where the layers go, as accelerate takes it ("auto" for several devices), in place of ``device``.
        quantize: "4bit" or "8bit", by bitsandbytes, else torchao, whichever is installed; or a quantisation config of
            transformers. The memory itself is never quantised.
        trust_remote_code: run Python code that comes with the model. It can do whatever you can.
        template_options: variables for the chat template, ``{"enable_thinking": False}`` for example.
        progress: show bars while files are fetched and weights loaded; None = for all but the embedded model.
        kv_cache_tokens, max_batch: see ``Engine``.

    Raises:
        MissingAdapterError: no adapter was given and the model has none of its own.
        AdapterError, ConfigError, UnsupportedModelError: the adapter or the model does not fit, options contradict each
            other, or a library that one of them needs is not installed.
        ModelNotFoundError: the model's files cannot be found or read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = str(NANO if model == "nano" else model)
    if device_map is not None and device != "auto":
        raise ConfigError(f"give device= or device_map=; found {device!r} and {device_map!r}")
    chosen = _device(device)
    number = _dtype(dtype, chosen)
    directory = None if adapter is False else _adapter_directory(place, adapter, adapter_revision)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    options: dict[str, Any] = {"attn_implementation": _attention(attn_implementation, chosen, dtype), "dtype": number}
    if quantize is not None:
        options["quantization_config"] = quantization_config(quantize, number)
        # Quantised as they are read, where they are to stay: some kinds cannot be moved afterwards.
        device_map = {"": str(chosen)} if device_map is None else device_map
    if device_map is not None:
        if find_spec("accelerate") is None:
            raise ConfigError(
                f"device_map= and quantize= need accelerate, which is not installed; {install_hint('quant')}"
            )
        options["device_map"] = device_map
    with _bars(model != "nano" if progress is None else progress):
        tokenizer = _found(AutoTokenizer.from_pretrained, place, **common)
        if getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"the tokenizer of {model} has no chat template; use a chat model, or set one and save it"
            )
        loaded = _found(AutoModelForCausalLM.from_pretrained, place, **common, **options)
    if device_map is None:
        loaded = loaded.to(chosen)
    loaded.requires_grad_(False)
    steered = None if directory is None else SteeredModel.attach(loaded, adapter=directory)
    if steered is not None:
        steered.memory.requires_grad_(False)  # an engine does not train, and of frozen weights more can be kept ready
    return Engine(
        loaded,
        tokenizer,
        steered,
        name=str(model),
        kv_cache_tokens=kv_cache_tokens,
        max_batch=max_batch,
        template_options=template_options,
    )


def context_limit(model: str | Path = "nano") -> int | None:
    """The longest context of a model in tokens, from its config file; None where that is not on this machine.

    Loads no weights and downloads nothing.
    """
    file = (NANO if model == "nano" else Path(model)) / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(str(model), "config.json")
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    config = json.loads(file.read_text("utf-8"))
    found = config.get("text_config", config).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _found(read: Callable[..., Any], place: str, **options: Any) -> Any:
    """Read from a directory or what the hub left here before; only then from the hub."""
    try:
        try:
            return read(place, local_files_only=True, **options)
        except OSError:
            if Path(place).exists():
                raise
            return read(place, **options)
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the model at {place!r} comes with Python code of its own, which is not run unasked; read it, "
                "and pass trust_remote_code=True if you trust it"
            ) from error
        raise ModelNotFoundError(
            f"no model at {place!r}: neither a directory with a whole one, nor a hub id that can be reached ({error})"
        ) from error


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Show the progress bars of transformers and of the hub, or hide them, for the time of a load."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    switches = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    switches[shown]()
    try:
        yield
    finally:
        switches[before]()


def _adapter_directory(model: str, adapter: str | Path | None, revision: str | None) -> Path:
    if adapter is None:
        own = Path(model) / "adapter"
        if (own / CONFIG_FILE).exists():
            return own
        raise MissingAdapterError(
            f"{model} has no adapter of its own: pass adapter= with a directory or hub id of one trained for it, "
            "or adapter=False to run it without memory"
        )
    if Path(adapter).is_dir():
        return Path(adapter)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    options: Any = {"allow_patterns": ["*.json", "*.safetensors", "*.pt"], "revision": revision}
    try:
        try:
            return Path(snapshot_download(str(adapter), local_files_only=True, **options))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(str(adapter), **options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(
            f"adapter {str(adapter)!r} is neither a directory nor a reachable hub id: {error}"
        ) from error


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _dtype(dtype: str | torch.dtype, device: torch.device) -> Any:
    if dtype == "auto" and device.type == "cpu":
        return torch.float32
    return dtype


def _attention(name: str, device: torch.device, dtype: str | torch.dtype) -> str:
    if name != "auto":
        return name
    half = dtype in ("auto", "bfloat16", "float16", torch.bfloat16, torch.float16)
    able = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return "flash_attention_2" if able and half and find_spec("flash_attn") is not None else "sdpa"
