"""Keys that sign receipts: a secret (HMAC-SHA256), or an Ed25519 key pair, of which the public half is enough to check.

The key decides how a signature is checked, never the receipt, so that a public key cannot be passed off as a secret.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentmem.errors import ConfigError, MissingExtraError

_MIN_SECRET_BYTES = 16
_PEM = b"-----BEGIN "


@dataclass(frozen=True)
class ReceiptKey:
    """A key for receipts.

    Attributes:
        algorithm: "hmac-sha256" or "ed25519"; stands before each signature.
        sign: gives the signature of bytes; None where the key is a public one, which can only check.
        check: whether the second bytes are the signature of the first.
    """

    algorithm: str
    sign: Callable[[bytes], bytes] | None
    check: Callable[[bytes, bytes], bool]


def receipt_key(key: bytes) -> ReceiptKey:
    """The key in these bytes: PEM is an Ed25519 key, private or public; anything else a secret for HMAC.

    Raises:
        ConfigError: it is shorter than 16 bytes, or PEM of something else.
        MissingExtraError: it is PEM, and `cryptography` is not installed.
    """
    if not isinstance(key, bytes) or len(key) < _MIN_SECRET_BYTES:
        raise ConfigError(f"expected a key of at least {_MIN_SECRET_BYTES} random bytes for receipts, found another")
    if key.lstrip().startswith(_PEM):
        return _ed25519(key)

    def sign(content: bytes) -> bytes:
        return hmac.digest(key, content, "sha256")

    return ReceiptKey("hmac-sha256", sign, lambda content, made: hmac.compare_digest(made, sign(content)))


def signing_key(key: bytes) -> Callable[[bytes], bytes]:
    """What signs with this key.

    Raises:
        ConfigError: as `receipt_key`, or the key is a public one.
        MissingExtraError: as `receipt_key`.
    """
    sign = receipt_key(key).sign
    if sign is None:
        raise ConfigError(
            "expected a private key to sign receipts with, found a public one, which only checks them; pass the "
            "private one"
        )
    return sign


def _ed25519(pem: bytes) -> ReceiptKey:
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ModuleNotFoundError as error:
        raise MissingExtraError("cryptography", "sign") from error
    loaded: Any
    try:
        loaded = load_pem_public_key(pem) if b"PUBLIC KEY-----" in pem else load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: the key is under a password
        raise ConfigError(
            f"expected an Ed25519 key for receipts as PEM without a password, found one that cannot be read ({error}); "
            "`openssl genpkey -algorithm ed25519` makes one"
        ) from error
    if not isinstance(loaded, Ed25519PrivateKey | Ed25519PublicKey):
        raise ConfigError(
            f"expected an Ed25519 key for receipts, found {type(loaded).__name__}; "
            "`openssl genpkey -algorithm ed25519` makes one"
        )
    private = loaded if isinstance(loaded, Ed25519PrivateKey) else None
    public = loaded if isinstance(loaded, Ed25519PublicKey) else loaded.public_key()

    def check(content: bytes, made: bytes) -> bool:
        try:
            public.verify(made, content)
        except InvalidSignature:
            return False
        return True

    return ReceiptKey("ed25519", None if private is None else private.sign, check)
