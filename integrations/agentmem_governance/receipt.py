"""A receipt: what was forgotten, as counts and digests, with what could not be reached; plain JSON, signed by a key.

It holds no text of messages or facts. The subject's name is in it, since whoever keeps receipts has to know whose they
are; keep them as such. Ids of checkpoints are random, ids of facts are hashes of their text, source and thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from agentmem.errors import ConfigError
from agentmem.text import parse_json
from agentmem_governance.signing import receipt_key, signing_key

FORMAT = 1


_TEXTS = ("messages", "facts", "purged", "not_reached")  # the fields that are lists of texts


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a deletion did.

    Attributes:
        id: names the receipt; the audit trail refers to it.
        operation: "forget subject", "forget thread" or "forget message".
        subject: whose; None in a receipt of a deletion that was completed after a crash at its very end, when the name
            had gone already.
        subject_digest: SHA-256 of the name.
        time: when it was complete, ISO 8601 in UTC.
        began: when it was asked for.
        actor: who asked for it.
        database: where, without password.
        threads: for each thread its key (SHA-256 of its id) and what went: numbers of checkpoints, pending writes and
            contents, their bytes, the ids of the checkpoints, and a digest over the contents' digests. Where a message
            was taken out of checkpoints that stayed, "rewritten" has their ids.
        messages: the ids of single messages that were forgotten.
        facts: the ids of facts that went.
        rebuilt: the memories that were built anew: thread, channel, and the digests before and after.
        purged: what was done to files so that they hold no bytes of it.
        not_reached: where bytes of it may still be, and what to do about that.
        format: version of this form.
        signature: over all of the above: "hmac-sha256:" or "ed25519:", and the signature in hexadecimal; None without
            a key.
    """

    id: str
    operation: str
    subject: str | None
    subject_digest: str
    time: str
    began: str
    actor: str
    database: str
    threads: Sequence[Mapping[str, Any]] = ()
    messages: Sequence[str] = ()
    facts: Sequence[str] = ()
    rebuilt: Sequence[Mapping[str, Any]] = ()
    purged: Sequence[str] = ()
    not_reached: Sequence[str] = ()
    format: int = FORMAT
    signature: str | None = field(default=None)

    @property
    def checkpoints(self) -> int:
        """How many checkpoints went."""
        return sum(int(thread["checkpoints"]) for thread in self.threads)

    @property
    def rewritten(self) -> int:
        """How many checkpoints stayed and were rewritten."""
        return sum(len(thread.get("rewritten", ())) for thread in self.threads)

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) over everything but the signature."""
        return sha256(self._body()).hexdigest()

    def _body(self) -> bytes:
        data = asdict(self)
        del data["signature"]
        return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()

    def signed(self, key: bytes) -> Receipt:
        """The receipt with a signature by this key.

        Args:
            key: at least 16 secret bytes, or an Ed25519 private key as PEM.

        Raises:
            ConfigError: the key cannot be used, or is a public one.
            MissingExtraError: it is PEM, and `cryptography` is not installed.
        """
        signature = signing_key(key)(self._body()).hex()
        return Receipt(**{**self._fields(), "signature": f"{receipt_key(key).algorithm}:{signature}"})

    def is_signed_by(self, key: bytes) -> bool:
        """Whether the signature is this key's, and of this very content.

        Args:
            key: the secret, or the Ed25519 key as PEM, private or public.

        Raises:
            ConfigError, MissingExtraError: as `signed`; or the receipt was signed with a key of the other kind.
        """
        if self.signature is None:
            return False
        known = receipt_key(key)
        algorithm, _, signature = self.signature.partition(":")
        if algorithm != known.algorithm:
            raise ConfigError(
                f"expected a key for {known.algorithm} to check a receipt of that kind, found one that is signed with "
                f"{algorithm[:40]!r}; pass the key that it was signed with (of ed25519 the public key, as PEM)"
            )
        try:
            return known.check(self._body(), bytes.fromhex(signature))
        except ValueError:  # no hexadecimal
            return False

    def _fields(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def to_json(self) -> str:
        """The receipt as text for a file."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the receipt to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")
        return Path(path)

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        """The inverse of `to_json`.

        Raises:
            ConfigError: the text is no receipt, or one of a newer version.
        """
        names = {each.name for each in fields(cls)}
        try:
            data = parse_json(text)
            if data.get("format", 0) > FORMAT:
                raise ConfigError(f"expected a receipt of format {FORMAT}, found {data['format']}; upgrade agentmem")
            if data.keys() != names:
                raise ConfigError(f"expected a receipt with {sorted(names)}, found {sorted(data)}")
            if wrong := [name for name, value in data.items() if not _fits(name, value)]:
                raise ConfigError(f"expected a receipt, found other values than one has as {', '.join(wrong)}")
        except (ValueError, AttributeError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"expected a receipt as JSON, found something else: {error}") from error
        return cls(**data)

    @classmethod
    def load(cls, path: str | Path) -> Receipt:
        """Read a receipt from a file; see `from_json` for the errors.

        Raises:
            ConfigError: the file cannot be read.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the receipt cannot be read: {error}") from error


@dataclass(frozen=True)
class Verification:
    """What a receipt says, compared with what is there.

    Attributes:
        signature: "valid", "invalid", "absent", or "not checked" where there is a signature and no key.
        back: what is there again, each in a sentence.
        noted: what the audit trail says of the receipt: "same", "another" if the receipt was changed since, or "absent"
            if it says nothing.
        wanted: whether a key was given, so that the receipt has to be signed with it.
    """

    signature: str
    back: tuple[str, ...]
    noted: str = "absent"
    wanted: bool = False

    @property
    def holds(self) -> bool:
        """Whether nothing is back, the audit trail notes no other receipt, and, if there was a key, it signed this."""
        return not self.back and self.noted != "another" and (not self.wanted or self.signature == "valid")


def _fits(name: str, value: Any) -> bool:
    """Whether a value from elsewhere is of the kind that this field of a receipt has.

    Raises:
        ValueError: the time is no time, or the key of a thread no hexadecimal.
    """
    if name == "threads":
        return _are(dict, value) and all(
            isinstance(thread.get("checkpoints"), int)
            and isinstance(thread.get("thread"), str)
            and bytes.fromhex(thread["thread"])
            and _are(str, thread.get("ids"))
            and _are(str, thread.get("rewritten", []))
            for thread in value
        )
    if name in _TEXTS or name == "rebuilt":
        return _are(str if name in _TEXTS else dict, value)
    if name == "format":
        return isinstance(value, int)
    if name in ("subject", "signature") and value is None:
        return True
    return isinstance(value, str) and (name != "time" or datetime.fromisoformat(value) is not None)


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
