"""The options of a delta-mem adapter: one frozen dataclass that reads and writes `delta_mem_config.json`.

Fields have the names of the authors' json keys where such keys exist, so that a config reads the same in code and on
disk. The json also carries switches of experiments that the authors have archived. Each must be at the value that turns
it off; otherwise `ConfigError` names the switch, because ignoring it would silently load a different mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from agentmem.errors import ConfigError
from agentmem.text import parse_json

WriteStrategy = Literal["token", "message", "sentence"]
UpdateMode = Literal["standard", "lambda_outside", "no_lambda"]
DeltaHead = Literal["q", "k", "v", "o"]
SteeredTokens = Literal["all", "reply"]

CONFIG_FILE = "delta_mem_config.json"
DIGEST_KEY = "agentmem_sha256"
"""In the json of adapters that agentmem saved: a digest of all that the adapter holds."""

DELTA_HEADS: tuple[DeltaHead, ...] = ("q", "k", "v", "o")

_GRANULARITY: dict[str, WriteStrategy] = {
    "token": "token",
    "message_mean": "message",
    "sentence_mean": "sentence",
}
_GRANULARITY_OUT = {strategy: name for name, strategy in _GRANULARITY.items()}

# Archived switches of the json, each with the one value that leaves the mechanism as it is.
_ARCHIVED_OFF: dict[str, Any] = {
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "slot_read_top_k": 0,
    "global_memory_read_top_k": 0,
    "memory_reader_layers": [],
    "latent_memory_layers": [],
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "target_modules": ["self_attn"],
    "delta_scale_parameterization": "alpha_over_rank",
}
# Options of those experiments. They have no effect while the switches above are off, so any value is accepted; they are
# written back with the values given here.
_ARCHIVED_IDLE: dict[str, Any] = {
    "memory_partition_routing": "soft",
    "memory_partition_basis": "shared",
    "tie_memory_partition_read_write": False,
    "memory_partition_read_mode": "softmax",
    "memory_partition_sigmoid_gate_bias_init": -2.0,
    "global_memory_mode": "shared_rw",
    "global_memory_merge_mode": "gated_residual",
    "global_memory_gate_bias_init": -2.0,
    "global_memory_read_logit_bias": 0.0,
    "memory_reader_hidden_size": 1024,
    "memory_reader_residual_scale": 0.1,
    "memory_reader_read_only": True,
    "memory_write_proposals_per_message": 2,
    "synthetic_memory_slots": 1,
    "latent_memory_hidden_size": 1024,
    "latent_memory_residual_scale": 0.1,
    "latent_memory_slots": 4,
    "latent_memory_init_std": 0.002,
    "latent_gate_init": 0.01,
}


@dataclass(frozen=True)
class MemoryConfig:
    """The options of one adapter. Defaults are the paper's (arXiv 2605.12357, section 3 and appendix A).

    Attributes:
        rank: r, the side of a state matrix.
        alpha: corrections are scaled by alpha / rank.
        num_state_heads: H, the number of state matrices in a layer (4 in the multi-state variant).
        write_strategy: what one write is computed from: a single token, the mean of a message, or the mean of a
            sentence.
        normalize_qk: tanh and L2 norm on memory queries and keys (both or neither).
        couple_lambda: whether retention is 1 - beta; otherwise it has weights of its own.
        state_update_mode: how retention, erasure and writing are computed from the gates (`layer.gates`).
        rankwise_gates: one gate for each state row; otherwise one for each state head.
        delta_heads: which projections are corrected.
        target_layers: layers that carry memory; empty means all.
        steered_tokens: which tokens an engine lets the memory correct. "all": every token, as in the paper. "reply":
            only those that predict a reply, which are the last token of a prompt and the reply's own; what is written
            then comes from the hidden states of the bare model, whatever the memory holds. Not an option of the
            authors' format; there it is in the json only where it is "reply".
        delta_o_rmsnorm: whether the correction of o goes through an RMSNorm, after all scaling.
        trainable_delta_scale: whether alpha / rank is multiplied by a trained factor sigmoid(raw) *
            delta_scale_max, one per layer or for each head (`delta_scale_granularity`).
        beta_bias_init, lambda_bias_init, output_init, base_slice_ref_width, online_gain, delta_scale_init:
            how new weights are initialised (`LayerMemory.reset_parameters`); no effect on loaded weights.

    Integers given for float fields become floats, and lists become tuples, so that equal configs are also equal on
    disk.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    num_state_heads: int = 1
    write_strategy: WriteStrategy = "token"
    normalize_qk: bool = True
    couple_lambda: bool = True
    state_update_mode: UpdateMode = "standard"
    rankwise_gates: bool = True
    delta_heads: tuple[DeltaHead, ...] = ("q", "o")
    target_layers: tuple[int, ...] = ()
    steered_tokens: SteeredTokens = "all"
    delta_o_rmsnorm: bool = False
    delta_o_rmsnorm_eps: float = 1e-6
    trainable_delta_scale: bool = False
    delta_scale_init: float = 1.0
    delta_scale_max: float = 2.0
    delta_scale_granularity: Literal["layer", "head"] = "layer"
    beta_bias_init: float = -1.5
    lambda_bias_init: float = 4.0
    output_init: str = "zero"
    base_slice_ref_width: int = 8
    online_gain: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _of_kind(field.name, getattr(self, field.name), field.default))
        self._need(1 <= self.rank <= 256, "rank", "an integer from 1 to 256")
        self._need(1 <= self.num_state_heads <= 64, "num_state_heads", "an integer from 1 to 64")
        self._need(self.write_strategy in get_args(WriteStrategy), "write_strategy", "token, message or sentence")
        self._need(
            self.state_update_mode in get_args(UpdateMode),
            "state_update_mode",
            "standard, lambda_outside or no_lambda",
        )
        self._need(self.steered_tokens in get_args(SteeredTokens), "steered_tokens", "all or reply")
        heads = self.delta_heads
        self._need(
            bool(heads) and all(h in DELTA_HEADS for h in heads) and len(set(heads)) == len(heads),
            "delta_heads",
            "a non-empty selection of q, k, v, o",
        )
        layers = self.target_layers
        self._need(
            all(type(n) is int and n >= 0 for n in layers) and len(set(layers)) == len(layers),
            "target_layers",
            "distinct layer numbers from 0, or none for all layers",
        )
        self._need(self.delta_scale_granularity in ("layer", "head"), "delta_scale_granularity", "layer or head")
        self._need(self.delta_scale_max > 0, "delta_scale_max", "a positive number")
        self._need(self.delta_o_rmsnorm_eps > 0, "delta_o_rmsnorm_eps", "a positive number")
        self._need(self.base_slice_ref_width >= 1, "base_slice_ref_width", "an integer from 1")

    def _need(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name} must be {expected}; found {getattr(self, name)!r}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def replace(self, **changes: Any) -> MemoryConfig:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The authors' json object. What theirs lacks is included only where it is not the default."""
        body: dict[str, Any] = {**_ARCHIVED_OFF, **_ARCHIVED_IDLE, **asdict(self)}
        body["memory_write_granularity"] = _GRANULARITY_OUT[body.pop("write_strategy")]
        body["delta_heads"] = list(self.delta_heads)
        body["target_layers"] = list(self.target_layers)
        for name in ("lambda_bias_init", "steered_tokens"):
            if body[name] == getattr(type(self), name):
                del body[name]
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> MemoryConfig:
        """Read the authors' json object.

        Raises:
            ConfigError: an unknown key, an archived option that is switched on, or a value of the wrong type.
        """
        names = {field.name for field in fields(cls)} - {"write_strategy"}
        options = names | _ARCHIVED_OFF.keys() | _ARCHIVED_IDLE.keys()
        unknown = sorted(body.keys() - options - {"memory_write_granularity", DIGEST_KEY})
        if unknown:
            raise ConfigError(f"unknown memory option {unknown[0]!r}; known options: {', '.join(sorted(options))}")
        for key, off in _ARCHIVED_OFF.items():
            if key in body and body[key] != off:
                raise ConfigError(
                    f"{key}={body[key]!r} belongs to an archived experiment that agentmem does not have; "
                    f"only {off!r} is supported. Train the adapter without it."
                )
        granularity = body.get("memory_write_granularity", "token")
        if not isinstance(granularity, str) or granularity not in _GRANULARITY:
            raise ConfigError(
                f"memory_write_granularity must be one of {', '.join(_GRANULARITY)}; found {granularity!r}"
            )
        values = {name: value for name, value in body.items() if name in names}
        return cls(write_strategy=_GRANULARITY[granularity], **values)

    @classmethod
    def load(cls, directory: str | Path) -> MemoryConfig:
        """Read `delta_mem_config.json` from an adapter directory."""
        return cls.from_json(read_config(directory))


def read_config(directory: str | Path) -> dict[str, Any]:
    """The json object of an adapter directory.

    Raises:
        ConfigError: it is missing, or no json object.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        body = parse_json(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: not an adapter directory") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable as json: {error}") from error
    if not isinstance(body, dict):
        raise ConfigError(f"{path} must hold a json object; found {type(body).__name__}")
    return body


def _of_kind(name: str, value: Any, default: Any) -> Any:
    """Check a value against the type of its field's default; see `MemoryConfig` for what is converted."""
    kind = type(default)
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ConfigError(f"{name} must be a finite number; found {value!r}")
        return number
    if type(value) is not kind:
        raise ConfigError(f"{name} must be a {kind.__name__}; found {value!r}")
    return value
