"""Loads a model, its tokenizer and its adapter into an engine: the embedded model, a directory, or a hub id.

Small files are read first, so that a wrong name, adapter or option is an error before gigabytes of weights are loaded:
options, the model's config, the adapter, the tokenizer, the weights. No code that comes with a model is executed unless
the caller allows it (`trust_remote_code`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from agentmem.delta.adapter import load_adapter
from agentmem.delta.config import CONFIG_FILE
from agentmem.delta.fingerprint import check_digests
from agentmem.delta.model import SteeredModel
from agentmem.delta.published import (
    CARD,
    PublishedAdapter,
    advice,
    check_base,
    find_published,
    published_for,
    recorded_name,
)
from agentmem.engine import Engine
from agentmem.errors import (
    AdapterError,
    ConfigError,
    MissingAdapterError,
    ModelNotFoundError,
    UnsupportedModelError,
    install_hint,
)
from agentmem.text import parse_json

NANO = Path(__file__).parent / "nano" / "weights"
SMOLLM2 = "smollm2"
"""The name that stands for SmolLM2-135M-Instruct as `make smollm2` lays it out."""
_SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


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
        model: "nano" (the embedded model), "smollm2" (SmolLM2-135M-Instruct in `build/smollm2` below the working
            directory, else in `agentmem/smollm2` of the user's cache), a directory, or a hub id. Local files are
            preferred.
        adapter: a directory, a hub id, or the last part of the hub id of a published one (see
            `agentmem.delta.published`); False = no memory. None = the first that there is: the model's `adapter`
            folder, the folder beside the model that has its name and "-adapter", the known one for this model.
        device: "auto" = CUDA, then Apple's, then the CPU.
        dtype: "auto" = float32 on a CPU, otherwise the dtype in which the weights are stored.
        attn_implementation: "auto" = flash_attention_2 where flash-attn is installed and the device supports it,
            else sdpa.
        revision, adapter_revision: branch, tag or commit on the hub.
        device_map: where the layers go, in accelerate's form ("auto" for several devices); replaces `device`.
        quantize: "4bit" or "8bit", by bitsandbytes or torchao, whichever is installed; or a quantisation config of
            transformers. The memory itself is never quantised.
        trust_remote_code: run Python code that comes with the model. It can do whatever you can.
        template_options: variables for the chat template, `{"enable_thinking": False}` for example.
        progress: show bars while files are downloaded and weights loaded; None = for all but the embedded model.
        kv_cache_tokens, max_batch: see `Engine`.

    Raises:
        MissingAdapterError: no adapter was given and the model has none of its own.
        AdapterError, ConfigError, UnsupportedModelError: the adapter or the model does not fit, options contradict each
            other, or a library that one of them needs is not installed.
        ModelNotFoundError: the model's files cannot be found or read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place = _existing_place(model)
    if not isinstance(template_options, Mapping | None):
        raise ConfigError(f"template_options are a mapping of names to values; found {template_options!r}")
    if device_map is not None and device != "auto":
        raise ConfigError(f"give device= or device_map=; found {device!r} and {device_map!r}")
    target = _device(device)
    number = _dtype(dtype, target)
    options: dict[str, Any] = {"attn_implementation": _attention(attn_implementation, target, dtype), "dtype": number}
    if quantize is not None:
        options["quantization_config"] = _quantization(quantize, number)
        # Quantised while they are read, on their final device: some formats cannot be moved afterwards.
        device_map = {"": str(target)} if device_map is None else device_map
    if device_map is not None:
        if find_spec("accelerate") is None:
            raise ConfigError(
                f"device_map= and quantize= need accelerate, which is not installed; {install_hint('quant')}"
            )
        options["device_map"] = device_map
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _bars(model != "nano" if progress is None else progress):
        check_digests(place)
        _read(AutoConfig.from_pretrained, place, **common)
        weights = None
        if adapter is not False:
            directory = _adapter_directory(place, adapter, adapter_revision)
            weights = load_adapter(directory)
            if weights.base is None:
                check_base(place, directory, str(adapter or directory))
        tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
        loaded, report = _read(
            AutoModelForCausalLM.from_pretrained, place, output_loading_info=True, **common, **options
        )
    if report["missing_keys"]:  # transformers would fill them with random numbers
        names = sorted(report["missing_keys"])
        raise ModelNotFoundError(
            f"the weights of the model at {place!r} are not complete: {len(names)} tensors are missing, the first is "
            f"{names[0]}; fetch the model again"
        )
    end = loaded.generation_config.eos_token_id
    if not all(isinstance(token, int) for token in (end if isinstance(end, list) else [end or 0])):
        raise ModelNotFoundError(
            f"the model at {place!r} is damaged: eos_token_id in its generation_config.json is a number or a list of "
            f"numbers; found {end!r}; fetch the model again"
        )
    if device_map is None:
        loaded = loaded.to(target)
    loaded.requires_grad_(False)
    steered = None if weights is None else SteeredModel.attach(loaded, adapter=weights)
    if steered is not None:
        steered.memory.requires_grad_(False)  # an engine does not train, and frozen weights can be packed
    return Engine(
        loaded,
        tokenizer,
        steered,
        name=str(model),
        kv_cache_tokens=kv_cache_tokens,
        max_batch=max_batch,
        template_options=template_options,
    )


def load_tokenizer(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, see `load`.

    Raises:
        ConfigError: it has no chat template.
        ModelNotFoundError: its files cannot be found or read.
    """
    from transformers import AutoTokenizer

    place = _existing_place(model)
    tokenizer = _read(AutoTokenizer.from_pretrained, place, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(f"the tokenizer of {model} has no chat template; use a chat model, or set one and save it")
    if not tokenizer.encode("a", add_special_tokens=False):  # what transformers makes of a directory without its files
        raise ModelNotFoundError(
            f"the model at {place!r} is not complete: its tokenizer has no vocabulary; fetch the model again"
        )
    return tokenizer


def load_skeleton(model: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A model without its weights (on torch's "meta" device), to look at its layers; raises as `load` does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    place = _existing_place(model)
    config = _read(AutoConfig.from_pretrained, place, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UnsupportedModelError(f"the model at {place!r} is no causal language model: {error}") from error


def context_limit(model: str | Path = "nano") -> int | None:
    """The longest context of a model in tokens, from its config file; None where the file is not here or is broken.

    Loads no weights and downloads nothing.
    """
    file = Path(_place(model)) / "config.json"
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
    try:
        config = parse_json(file.read_text("utf-8"))
        limit = config.get("text_config", config).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):  # a broken file; `load` raises a better error
        return None
    return limit if isinstance(limit, int) else None


def _place(model: str | Path) -> str:
    """The directory that a name stands for; any other text, and a name whose directory is missing, as it is."""
    if model == "nano":
        return str(NANO)
    places = _smollm2_places() if model == SMOLLM2 else []
    return str(next((place for place in places if (place / "config.json").is_file()), model))


def _existing_place(model: str | Path) -> str:
    """The same; refuses a model that has a name of ours and is not there."""
    place = _place(model)
    if model == SMOLLM2 and place == SMOLLM2:
        command = f"python -m agentmem.training.smollm2 {_smollm2_places()[1]}"
        raise ModelNotFoundError(
            f"smollm2 is expected in {' or '.join(map(str, _smollm2_places()))}, and is in neither; run `make smollm2` "
            f"in a clone, or `{command}` (either fetches 93 MB), or load {_SMOLLM2_HUB!r} from a hub"
        )
    return place


def _smollm2_places() -> list[Path]:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [Path("build", "smollm2"), Path(cache, "agentmem", "smollm2")]


def _read(read: Callable[..., Any], place: str, **options: Any) -> Any:
    """Read from a local directory or the hub's local cache; only then from the hub itself.

    Raises:
        ConfigError: the model needs its own code, or a library that is not installed.
        ModelNotFoundError: the files are missing or broken.
    """
    there = Path(place).exists()
    try:
        try:
            return read(place, local_files_only=True, **options)
        except OSError:
            if there:
                raise
            return read(place, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise ConfigError(f"the model at {place!r} needs a library that is not installed: {error}") from error
    except Exception as error:  # broken files raise many types in transformers, tokenizers and safetensors
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the model at {place!r} comes with Python code of its own, which is not run unasked; read it, "
                "and pass trust_remote_code=True if you trust it"
            ) from error
        if (attention := options.get("attn_implementation")) and "attention" in str(error) and attention in str(error):
            raise ConfigError(f"attn_implementation={attention!r} does not work with this model: {error}") from error
        why = (
            "a whole one is expected there, and a file of it cannot be read"
            if there
            else ("neither a directory with a whole one, nor a hub id that can be reached")
        )
        raise ModelNotFoundError(f"no model at {place!r}: {why} ({type(error).__name__}: {error})") from error


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of transformers and of the hub during a load."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    switches = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    switches[shown]()
    try:
        yield
    finally:
        switches[enabled]()


def _adapter_directory(model: str, adapter: str | Path | None, revision: str | None) -> Path:
    if adapter is None:
        return _own_adapter(model)
    if Path(adapter).is_dir():
        return Path(adapter)
    return _fetched(find_published(str(adapter)) or str(adapter), revision)


def _own_adapter(model: str) -> Path:
    """The adapter of a model for which none was given."""
    place = Path(model).resolve()
    for directory in (place / "adapter", place.parent / f"{place.name}-adapter"):
        if place.is_dir() and (directory / CONFIG_FILE).exists():
            return directory
    known = published_for(model, recorded_name(place) if place.is_dir() else "")
    missing = (
        f"{model} has no adapter of its own: pass adapter= (--adapter) with a directory or hub id of one trained for "
        f"it, or adapter=False (--adapter none) to run it without memory; {advice(model)}"
    )
    if known is None:
        raise MissingAdapterError(missing)
    try:
        return _fetched(known, None)
    except AdapterError as error:
        raise MissingAdapterError(f"{missing}; the one that is known for it is not at hand: {error}") from error


def _fetched(adapter: PublishedAdapter | str, revision: str | None) -> Path:
    """The directory of an adapter that ships with this package or is on the hub."""
    if isinstance(adapter, PublishedAdapter) and adapter.directory is not None:
        return adapter.directory
    name = adapter if isinstance(adapter, str) else adapter.name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    options: Any = {"allow_patterns": ["*.json", "*.safetensors", "*.pt", CARD], "revision": revision}
    try:
        try:
            return Path(snapshot_download(name, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(name, **options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(f"adapter {name!r} is neither a directory nor a reachable hub id: {error}") from error


def _device(name: str) -> torch.device:
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)  # a device that this build of torch or this machine has not
        except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(
                f'device takes "auto" or a device of torch that is here, "cuda:1" for example; found {name!r}: {error}'
            ) from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _dtype(dtype: str | torch.dtype, device: torch.device) -> Any:
    if dtype == "auto" and device.type == "cpu":
        return torch.float32
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise ConfigError(f'dtype takes "auto" or a dtype of torch, "bfloat16" for example; found {dtype!r}')
        return named
    return dtype


def _attention(name: str, device: torch.device, dtype: str | torch.dtype) -> str:
    if name != "auto":
        return name
    half = dtype in ("auto", "bfloat16", "float16", torch.bfloat16, torch.float16)
    able = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return "flash_attention_2" if able and half and find_spec("flash_attn") is not None else "sdpa"


def _quantization(wanted: Any, dtype: str | torch.dtype) -> Any:
    """The quantisation config to pass to transformers.

    Only the base model is quantised. The memory's weights, its state and its arithmetic stay as they are. The model's
    fingerprint leaves out quantised weights and so stays the same: states can be moved between forms of one model.

    Args:
        wanted: "4bit" (NF4 by bitsandbytes, else int4 weights by torchao), "8bit" (LLM.int8 by bitsandbytes, else
            int8 weights by torchao), or a config of transformers, which is returned unchanged.
        dtype: dtype of the arithmetic; "auto" = bfloat16.

    Raises:
        ConfigError: `wanted` has another value, or neither library is installed.
    """
    if not isinstance(wanted, str):
        return wanted
    if wanted not in ("4bit", "8bit"):
        raise ConfigError(f"quantize takes '4bit', '8bit' or a quantisation config of transformers; found {wanted!r}")
    if find_spec("bitsandbytes") is not None:
        return _bitsandbytes(wanted, dtype)
    # torchao's int4 kernels are a separate package.
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
