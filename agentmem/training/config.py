"""Every option of a training run: one dataclass, from which the YAML file and the options of the command follow.

A key is defined once, here: its name, type, default and meaning. `agentmem train --help` and the table in
`docs/reference/train.md` are made from the same metadata. This module imports no torch, so that the command's help
costs nothing.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from agentmem.errors import ConfigError

RUN_FILE = "train.json"
"""In the output directory: the config of the run that it belongs to."""

_MAY_CHANGE = (
    *("resume", "device", "threads", "workers", "report_to", "out", "format", "store", "push", "save_every", "keep"),
    *("evaluate_every", "probes", "probe_tokens", "patience", "frozen_cache"),
)
"""Keys that a resumed run may set anew: they do not change what is learned from which conversation."""
_DIVISION = ("batch_size", "accumulate")  # free as long as a step has as many conversations in all


def _key(default: Any, group: str, text: str) -> Any:
    metadata = {"group": group, "help": text}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run; what each means stands in its field's metadata.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or two options contradict each other.
    """

    model: str = _key("", "model", "The model to train a memory for: a directory or a hub id.")
    adapter: str | None = _key(None, "model", "An adapter to start from, with its memory options.")
    device: Literal["auto", "cpu", "cuda", "mps"] = _key(
        "auto", "model", "Where to train; auto takes the best there is."
    )
    dtype: str = _key("auto", "model", "Of the model's weights; the memory is trained in float32 beside any of them.")
    quantize: Literal["4bit", "8bit"] | None = _key(None, "model", "Load the model's weights in 4 or 8 bits.")
    attn_implementation: str = _key("auto", "model", "The model's attention: sdpa, eager, flash_attention_2.")
    trust_remote_code: bool = _key(False, "model", "Run Python code that comes with the model.")
    memory: Mapping[str, Any] = _key({}, "memory", "Options of the memory: rank=16, write_strategy=message ...")
    start: Literal["zero", "copier", "fitted"] = _key(
        "copier", "memory", "New weights: without effect, giving back what was written, or fitted to the model first."
    )
    start_conversations: int = _key(500, "memory", "Conversations that new weights are fitted to.")
    refit_conversations: int = _key(
        0, "memory", "Conversations from which an adapter's keys and queries are learned anew before it is trained on."
    )
    lens_steps: int = _key(0, "memory", "Steps through a logit lens after that, on these conversations: see below.")
    static: bool = _key(
        False, "memory", "In place of a memory, a static LoRA (peft) of as many parameters on the same projections."
    )
    data: tuple[str, ...] = _key((), "data", "JSONL files, or facts, sgd, taskmaster4, personas; may be repeated.")
    data_dir: str | None = _key(None, "data", "The folder that holds sgd, taskmaster4 and personas.")
    data_shares: tuple[float, ...] = _key((), "data", "How much of each: a number for each source; none: equal.")
    max_bad: float = _key(0.05, "data", "The share of unusable lines above which a file is refused.")
    held_out: int = _key(64, "data", "Conversations that training never sees and that the memory is measured on.")
    facts: Mapping[str, Any] = _key({}, "data", "Options of the facts source: facts=[1,4], changes=0.3 ...")
    window_messages: int | None = _key(1, "window", "Messages that a prompt shows; null: no limit.")
    window_tokens: int | None = _key(4096, "window", "Tokens that a prompt shows; null: no limit.")
    history: Literal["turns", "exchanges", "whole", "mixed"] = _key(
        "mixed",
        "window",
        "How the past was written: turns, exchanges, whole (see below), or mixed.",
    )
    other_weight: float = _key(0.1, "loss", "Weight of a reply's tokens that carry no asked value; a value's have 1.")
    gradient: Literal["full", "first_order"] = _key(
        "full", "loss", "Through the memory's own effect on what is written (full), or not (first_order: cheaper)."
    )
    full_gradient_from: float = _key(1.0, "loss", "Share of the steps after which first_order becomes full.")
    read_penalty: float = _key(0.0, "loss", "Weight of a penalty on reads where nothing is asked.")
    read_warmup: float = _key(
        0.0, "loss", "Share of the steps over which tokens outside of replies come to be corrected by what they read."
    )
    truncate: int | None = _key(None, "loss", "Turns back through which the gradient goes; null: all.")
    gradient_checkpointing: bool = _key(False, "loss", "Compute activations again and not keep them: slower, smaller.")
    frozen_cache: float = _key(
        1.0, "loss", "Gigabytes for what the layers below the memory make of texts, where data comes back; 0: none."
    )
    max_steps: int = _key(1000, "steps", "Steps in all.")
    batch_size: int = _key(8, "steps", "Conversations of a step on each device.")
    accumulate: int = _key(1, "steps", "Batches whose gradients make one step.")
    learning_rate: float = _key(2e-3, "steps", "The highest rate.")
    rates: Mapping[str, float] = _key(
        {},
        "steps",
        "Shares of that rate for some parameters, by name: memory_k_proj=0.05 ...; 0: they stay as they are.",
    )
    warmup: int = _key(40, "steps", "Steps until it is reached.")
    floor: float = _key(0.05, "steps", "What the rate decays to, along a cosine, as a share of the highest.")
    betas: tuple[float, float] = _key((0.9, 0.98), "steps", "Of AdamW.")
    weight_decay: float = _key(0.0, "steps", "Of AdamW, on matrices only.")
    clip: float = _key(1.0, "steps", "The largest norm of a step's gradient.")
    seed: int = _key(0, "steps", "Determines new weights, and which conversation comes when.")
    evaluate_every: int = _key(200, "measure", "Steps between measurements on held-out conversations; 0: none.")
    probes: int = _key(64, "measure", "Questions of a measurement.")
    probe_tokens: int = _key(48, "measure", "The longest reply to one of them.")
    patience: int = _key(0, "measure", "Measurements without a better score after which training ends; 0: never.")
    save_every: int = _key(200, "run", "Steps between checkpoints.")
    keep: int = _key(2, "run", "Checkpoints kept.")
    threads: int | None = _key(None, "run", "CPU threads; null: torch's own number.")
    workers: int = _key(0, "run", "Processes that prepare batches; 0: the training process itself.")
    report_to: tuple[str, ...] = _key((), "run", "tensorboard or trackio, beside log.jsonl.")
    out: str = _key("", "run", "The directory for the adapter, its card, log and checkpoints.")
    resume: bool = _key(False, "run", "Go on with the run in that directory, if there is one.")
    format: Literal["ours", "authors"] = _key("ours", "run", "Of the adapter: safetensors, or as the paper's authors.")
    store: Literal["float32", "bfloat16"] = _key(
        "float32", "run", "Of the adapter's weights in its file; bfloat16 makes it half as large."
    )
    push: str | None = _key(None, "run", "Upload the adapter and its card to this repository of the hub: ORG/NAME.")

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, of_type(each.name, key_types()[each.name], getattr(self, each.name)))
        for name in (
            "max_steps",
            "batch_size",
            "accumulate",
            "save_every",
            "keep",
            "probes",
            "probe_tokens",
            "start_conversations",
        ):
            self._need(getattr(self, name) >= 1, name, "at least 1")
        for name in (
            "warmup",
            "evaluate_every",
            "patience",
            "workers",
            "held_out",
            "lens_steps",
            "refit_conversations",
        ):
            self._need(getattr(self, name) >= 0, name, "at least 0")
        for name in ("window_messages", "window_tokens", "threads", "truncate"):
            self._need(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1, or null")
        for name in ("weight_decay", "read_penalty", "other_weight", "frozen_cache"):
            self._need(getattr(self, name) >= 0, name, "at least 0")
        for name in ("max_bad", "floor", "full_gradient_from", "read_warmup"):
            self._need(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        self._need(self.learning_rate > 0, "learning_rate", "above 0")
        numbers = all(type(share) in (int, float) and share >= 0 for share in self.rates.values())
        self._need(numbers, "rates", "a number from 0 for each name")
        self._need(self.clip > 0, "clip", "above 0")
        self._need(all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers from 0 to below 1")
        self._need(all(share > 0 for share in self.data_shares), "data_shares", "numbers above 0")
        if self.data_shares and len(self.data_shares) != len(self.data):
            raise ConfigError(
                f"data_shares needs a number for each source; found {len(self.data_shares)} for {len(self.data)} "
                f"({', '.join(self.data) or 'no data'})"
            )
        for name in self.report_to:
            self._need(name in ("tensorboard", "trackio"), "report_to", "tensorboard, trackio or nothing")
        if self.patience and not self.evaluate_every:
            raise ConfigError(
                "patience counts measurements, and evaluate_every: 0 makes none; set one of them otherwise"
            )
        if self.lens_steps and self.start != "fitted":
            raise ConfigError(f"lens_steps go on from start: fitted; found start: {self.start}")
        if self.refit_conversations and self.adapter is None:
            raise ConfigError("refit_conversations are for an adapter; new weights are fitted with start: fitted")
        if self.static and self.adapter is not None:
            raise ConfigError("a static LoRA starts anew; give adapter (to train a memory further) or static, not both")
        if self.adapter is not None and self.memory:
            raise ConfigError(
                "an adapter has memory options of its own: give adapter (to train it further) or memory (for a new one)"
            )

    def _need(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name} must be {expected}; found {getattr(self, name)!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make a config from keys and values, as they are in a YAML file.

        Raises:
            ConfigError: a key is unknown (the message suggests the likeliest), or a value does not fit.
        """
        names = [each.name for each in fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(f"unknown key {key!r}{suggestion(str(key), names)}; docs/reference/train.md has all")
        return cls(**values)

    @classmethod
    def read(cls, path: str | Path | None, changes: Mapping[str, Any] | None = None) -> TrainConfig:
        """Read a YAML file (None: none), with some keys changed. `memory` and `facts` are changed key by key.

        Raises:
            ConfigError: the file is missing or no YAML mapping, or a key or value does not fit.
        """
        values = {} if path is None else _read_yaml(Path(path))
        for name, value in (changes or {}).items():
            both = isinstance(value, Mapping) and isinstance(values.get(name), Mapping)
            values[name] = {**values[name], **value} if both else value
        return cls.from_mapping(values)

    def to_mapping(self) -> dict[str, Any]:
        """All keys, as they go into a YAML or JSON file."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def differences(self, other: Mapping[str, Any], conversations: int, other_conversations: int) -> list[str]:
        """In what a resumed run's config may not differ from the run's, but does: a line for each key.

        Args:
            other: the keys of the run that was started.
            conversations, other_conversations: how many conversations a step has over all devices. As long as it is
                the same, they may be divided otherwise among batches and devices.
        """
        mine = self.to_mapping()
        skipped = {*_MAY_CHANGE, *_DIVISION}
        lines = [
            f"{key} was {other.get(key)!r}, now {mine[key]!r}"
            for key in mine
            if key not in skipped and mine[key] != other.get(key)
        ]
        if conversations != other_conversations:
            lines.append(
                f"a step had {other_conversations} conversations, now {conversations} "
                "(batch_size x accumulate x devices)"
            )
        return lines


def suggestion(word: str, names: typing.Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the likeliest of some names, or nothing."""
    close = get_close_matches(word, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, such as `max_steps: 1000`; found {type(values).__name__}")
    return values


@cache
def key_types() -> dict[str, Any]:
    """The type of each key."""
    return typing.get_type_hints(TrainConfig)


def is_union(hint: Any) -> bool:
    """Whether a type is a union; of the keys' types that means: something, or None."""
    return get_origin(hint) in (typing.Union, types.UnionType)


def of_type(name: str, hint: Any, value: Any) -> Any:
    """The value as its type asks; YAML's lists become tuples, and 3e-3, which YAML takes for text, a number.

    Raises:
        ConfigError: it does not fit; the message has the name.
    """
    if is_union(hint):
        if value is None:
            return None
        (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in inner:
            close = suggestion(str(value), map(str, inner))
            raise ConfigError(f"{name} must be one of {', '.join(map(str, inner))}; found {value!r}{close}")
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str | int | float) else list(value) if value is not None else []
        kinds = inner[:1] * len(items) if inner[-1] is Ellipsis else inner
        if len(items) != len(kinds):
            raise ConfigError(f"{name} must be {len(kinds)} values; found {value!r}")
        return tuple(of_type(name, kind, item) for kind, item in zip(kinds, items, strict=True))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must hold keys and values; found {value!r}")
        return dict(value)
    if hint is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{name} must be a number; found {value!r}") from None
    if hint is float and type(value) is int:
        value = float(value)
    if hint is str and isinstance(value, Path):
        value = str(value)
    if type(value) is not hint:
        wanted = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[hint]
        raise ConfigError(f"{name} must be {wanted}; found {value!r}")
    return value
