"""MemoryState: matrices, the record of what they have consumed, and their origin, as one immutable value.

A state consists of bytes, strings, integers and one list, so that any carrier (a checkpoint, a queue, a file) can hold
it without a codec of ours, and nothing executable is ever loaded. Its digest covers every field, and states are equal
if their digests are. A state that is truncated, altered or foreign is refused with a typed error and never repaired.

There are three plain forms, and each is verified completely when it is read:

- `to_dict` / `from_dict`: a flat dict of msgpack's own types, for checkpoints.
- `to_json` / `from_dict`: the same dict with base64 text in place of bytes, for servers, SDKs and stores.
- `to_bytes` / `from_bytes`: magic, header length, JSON header, matrices, SHA-256 of all of it; for files.

Needs only numpy. The name of this module and of the class are part of the on-disk format.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agentmem.errors import CorruptStateError, StateMismatchError
from agentmem.record import ConsumedRecord
from agentmem.text import parse_json

VERSION = 1

_MAGIC = b"agentmem"
_LENGTH = 4  # bytes of the header's length, little-endian
_CHECK = 32  # bytes of the SHA-256 at the end
_ITEM = 4  # bytes of a float32
_BYTES = ("data", "chain", "tail")  # the fields that are bytes


@dataclass(frozen=True, eq=False, repr=False)
class MemoryState:
    """The memory of one session: float32 matrices and the record of what was written into them.

    Attributes:
        shape: [layers, heads, rank, rank].
        data: the matrices, little-endian float32 in C order.
        model_fingerprint: fingerprint of the model that wrote them.
        adapter_fingerprint: fingerprint of the adapter that wrote them.
        count, chain, tail: the record of what was consumed, see `agentmem.record`.
        version: version of this format.

    Raises:
        CorruptStateError: a field has the wrong type or size, or a number is not finite.
    """

    shape: tuple[int, ...]
    data: bytes
    model_fingerprint: str
    adapter_fingerprint: str
    count: int
    chain: bytes
    tail: bytes
    version: int = VERSION

    def __post_init__(self) -> None:
        if not _is_int(self.version) or self.version < 1:
            raise CorruptStateError(f"a state's version is an integer from 1 up; found {self.version!r}")
        _refuse_newer(self.version)
        if not isinstance(self.shape, (list, tuple)) or not all(_is_int(n) and n > 0 for n in self.shape):
            raise CorruptStateError(f"a state's shape is a list of positive integers; found {self.shape!r}")
        if len(self.shape) != 4 or self.shape[2] != self.shape[3]:
            raise CorruptStateError(f"a state's shape is [layers, heads, rank, rank]; found {list(self.shape)}")
        object.__setattr__(self, "shape", tuple(self.shape))
        for name in _BYTES:
            value = getattr(self, name)
            if not isinstance(value, (bytes, bytearray, memoryview)):
                raise CorruptStateError(f"a state's {name} is bytes; found {type(value).__name__}")
            object.__setattr__(self, name, bytes(value))
        for name in ("model_fingerprint", "adapter_fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise CorruptStateError(f"a state's {name} is a string; found {type(getattr(self, name)).__name__}")
        expected = math.prod(self.shape) * _ITEM
        if len(self.data) != expected:
            raise CorruptStateError(
                f"a state of shape {list(self.shape)} holds {expected} bytes of float32; found {len(self.data)}"
            )
        if not np.isfinite(self.matrices).all():
            raise CorruptStateError("a state's numbers are finite; found NaN or infinity")
        ConsumedRecord(self.count, self.chain, self.tail)  # refuses an inconsistent record
        # Serialisers of dataclasses save an instance's attributes; without its cached digest a state could not be
        # restored.
        _ = self.digest

    @classmethod
    def from_matrices(
        cls, matrices: ArrayLike, record: ConsumedRecord, *, model_fingerprint: str, adapter_fingerprint: str
    ) -> MemoryState:
        """A state from an array [layers, heads, rank, rank]; the numbers are copied as float32."""
        array = np.ascontiguousarray(matrices, dtype="<f4")
        return cls(
            shape=array.shape,
            data=array.tobytes(),
            model_fingerprint=model_fingerprint,
            adapter_fingerprint=adapter_fingerprint,
            count=record.count,
            chain=record.chain,
            tail=record.tail,
        )

    @classmethod
    def zeros(cls, shape: Sequence[int], model_fingerprint: str, adapter_fingerprint: str) -> MemoryState:
        """The state of a session in which nothing was said yet. `shape` is [layers, heads, rank, rank]."""
        return cls.from_matrices(
            np.zeros(tuple(shape), dtype=np.float32),
            ConsumedRecord.empty(),
            model_fingerprint=model_fingerprint,
            adapter_fingerprint=adapter_fingerprint,
        )

    @property
    def matrices(self) -> NDArray[np.float32]:
        """The matrices [layers, heads, rank, rank], float32: a read-only view of `data`."""
        return np.frombuffer(self.data, dtype="<f4").reshape(self.shape)

    @property
    def record(self) -> ConsumedRecord:
        """The record of what these matrices have consumed."""
        return ConsumedRecord(self.count, self.chain, self.tail)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) over every field, in an unambiguous encoding."""
        header = json.dumps(self._header(), sort_keys=True, separators=(",", ":")).encode("ascii")
        digest = hashlib.sha256(_MAGIC + len(header).to_bytes(_LENGTH, "little") + header)
        digest.update(self.data)
        return digest.hexdigest()

    def _header(self) -> dict[str, Any]:
        """Every field except the matrices, in JSON's types."""
        return {
            "version": self.version,
            "shape": list(self.shape),
            "model_fingerprint": self.model_fingerprint,
            "adapter_fingerprint": self.adapter_fingerprint,
            "count": self.count,
            "chain": self.chain.hex(),
            "tail": self.tail.hex(),
        }

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, MemoryState) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __copy__(self) -> MemoryState:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryState:
        return self

    def __reduce__(self) -> tuple[type[MemoryState], tuple[Any, ...]]:
        # Restored through the constructor, which verifies the fields and computes the digest anew.
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    def __repr__(self) -> str:
        return f"MemoryState({self.digest[:12]}, layers={self.shape[0]}, consumed={self.count})"

    def replaced(self, *, matrices: ArrayLike | None = None, record: ConsumedRecord | None = None) -> MemoryState:
        """This state with other matrices of the same shape, another record, or both.

        Raises:
            StateMismatchError: the matrices have another shape.
        """
        changes: dict[str, Any] = {}
        if matrices is not None:
            array = np.ascontiguousarray(matrices, dtype="<f4")
            if array.shape != self.shape:
                raise StateMismatchError(
                    f"matrices of shape {list(self.shape)} were expected; found {list(array.shape)}"
                )
            changes["data"] = array.tobytes()
        if record is not None:
            changes.update(count=record.count, chain=record.chain, tail=record.tail)
        return replace(self, **changes)

    def require(self, model_fingerprint: str, adapter_fingerprint: str, shape: Sequence[int]) -> None:
        """Refuse this state unless it has this shape and was written by this model and adapter.

        Raises:
            StateMismatchError: it was not; the error names both sides.
        """
        same = same_model(model_fingerprint, self.model_fingerprint)
        checks = (
            (same, "model", model_fingerprint, self.model_fingerprint),
            (adapter_fingerprint == self.adapter_fingerprint, "adapter", adapter_fingerprint, self.adapter_fingerprint),
            (tuple(shape) == self.shape, "shape", list(shape), list(self.shape)),
        )
        wrong = [f"{name} {here!r} here, {there!r} in the state" for fits, name, here, there in checks if not fits]
        if wrong:
            raise StateMismatchError(
                f"{self!r} was written elsewhere: {'; '.join(wrong)}. "
                "Load the model and adapter that wrote it, or start from a new state"
            )

    def to_dict(self) -> dict[str, Any]:
        """Every field and the digest, in types that msgpack can hold."""
        plain: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"shape": list(self.shape), "digest": self.digest}

    def to_json(self) -> dict[str, Any]:
        """As `to_dict`, in types that JSON can hold: bytes are base64 text."""
        plain = self.to_dict()
        return plain | {name: base64.b64encode(plain[name]).decode() for name in _BYTES}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> MemoryState:
        """The state from the result of `to_dict` or `to_json`.

        Raises:
            CorruptStateError: a key is missing or unknown, or a value is not what was written.
        """
        if not isinstance(plain, Mapping):
            raise CorruptStateError(f"a state's plain form is a dict; found {type(plain).__name__}")
        names = {field.name for field in fields(cls)}
        _refuse_newer(plain.get("version"))  # first, since a newer version may have other keys
        missing, unknown = (names | {"digest"}) - plain.keys(), plain.keys() - names - {"digest"}
        if missing or unknown:
            raise CorruptStateError(
                f"a state's dict has the keys {', '.join(sorted(names | {'digest'}))}; "
                f"missing: {sorted(missing)}, unknown: {sorted(map(str, unknown))}"
                + (_UNREGISTERED if missing == {"digest"} else "")
            )
        state = cls(**{name: _from_text(name, plain[name]) for name in names})
        if plain["digest"] != state.digest:
            raise CorruptStateError(
                f"a state's digest is that of its other fields, {state.digest}; found {plain['digest']!r}; "
                "it was altered after it was written"
            )
        return state

    def to_bytes(self) -> bytes:
        """The state as the content of a file."""
        header = json.dumps(self._header() | {"digest": self.digest}, sort_keys=True).encode("ascii")
        body = _MAGIC + len(header).to_bytes(_LENGTH, "little") + header + self.data
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, content: bytes | bytearray | memoryview) -> MemoryState:
        """The state from the result of `to_bytes`.

        Raises:
            CorruptStateError: the bytes are not exactly those that were written.
        """
        if not isinstance(content, bytes | bytearray | memoryview):
            raise CorruptStateError(f"a state file's content is bytes; found {type(content).__name__}")
        content = bytes(content)
        if not content.startswith(_MAGIC):
            raise CorruptStateError(
                f"a state file starts with {_MAGIC!r}; found {content[: len(_MAGIC)]!r}; it is no state"
            )
        body, check = content[:-_CHECK], content[-_CHECK:]
        if hashlib.sha256(body).digest() != check:
            raise CorruptStateError(
                f"a state file ends with the SHA-256 of the rest; the {len(content)} bytes found do not: "
                "the file was truncated or altered"
            )
        start = len(_MAGIC) + _LENGTH
        stop = start + int.from_bytes(body[len(_MAGIC) : start], "little")
        try:
            header = parse_json(body[start:stop])
            plain = header | {name: bytes.fromhex(header[name]) for name in ("chain", "tail")}
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptStateError(f"a state file has a JSON header; found none ({error!r})") from error
        return cls.from_dict(plain | {"data": body[stop:]})

    def stats(self) -> dict[str, Any]:
        """Statistics of the matrices, one dict per layer.

        Each layer counts as the block-diagonal matrix of its heads, with singular values s:

        - norm: Frobenius norm, sqrt(sum s^2)
        - stable_rank: sum s^2 / max s^2
        - effective_rank: exp of the entropy of s^2 / sum s^2
        - top_share: share of the energy in the strongest direction, max s^2 / sum s^2

        All are 0 for a layer of zeros.
        """
        values = np.linalg.svd(self.matrices.astype(np.float64), compute_uv=False)  # [L, H, r]
        energy = np.square(values).reshape(self.shape[0], -1)  # [L, H * r]
        return {
            "digest": self.digest,
            "shape": list(self.shape),
            "bytes": len(self.data),
            "consumed": self.count,
            "norm": float(np.sqrt(energy.sum())),
            "layers": [_layer_stats(row) for row in energy],
        }


def as_state(value: MemoryState | Mapping[str, Any]) -> MemoryState:
    """A memory that is given as a value, as its plain dict or in its JSON form; the latter two are verified.

    Raises:
        CorruptStateError: it is something else, or the dict is not exactly what `to_dict` or `to_json` returned.
    """
    return value if isinstance(value, MemoryState) else MemoryState.from_dict(value)


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model: they agree in one of their parts (see `agentmem.delta.fingerprint`).

    The parts are separated by dots. Fingerprints that older versions wrote have the first part only.
    """
    return any(a == b for a, b in zip(one.split("."), other.split("."), strict=False))


def _layer_stats(energy: NDArray[np.float64]) -> dict[str, float]:
    total, top = float(energy.sum()), float(energy.max())
    if total == 0.0:
        return {"norm": 0.0, "stable_rank": 0.0, "effective_rank": 0.0, "top_share": 0.0}
    shares = energy[energy > 0] / total
    return {
        "norm": math.sqrt(total),
        "stable_rank": total / top,
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
        "top_share": top / total,
    }


_UNREGISTERED = (
    "; LangGraph's strict msgpack gives a MemoryState back so where its type is not registered (@entrypoint): "
    "save state.to_dict(), or allow ('agentmem.state', 'MemoryState')"
)


def _from_text(name: str, value: Any) -> Any:
    """The value of a field; bytes that came as base64 text are decoded."""
    if name not in _BYTES or not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CorruptStateError(
            f"a state's {name} is bytes, or their base64 text; found other text ({error})"
        ) from None


def _refuse_newer(version: object) -> None:
    if isinstance(version, int) and version > VERSION:
        raise CorruptStateError(
            f"this agentmem reads states up to version {VERSION}; found version {version}; upgrade agentmem"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
