"""Receipts are signed by a secret or by an Ed25519 key, whose public half checks them and cannot make any."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agentmem.errors import ConfigError
from agentmem_governance import Governor, Receipt
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, put

PKCS8 = serialization.PrivateFormat.PKCS8
PEM = serialization.Encoding.PEM
SECRET = b"k" * 32


def pair() -> tuple[bytes, bytes]:
    """A private key and its public one, as PEM."""
    made = Ed25519PrivateKey.generate()
    public = made.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return made.private_bytes(PEM, PKCS8, serialization.NoEncryption()), public


def test_the_public_key_checks_and_cannot_forget(url: str) -> None:
    private, public = pair()
    _, another = pair()
    with SQLAlchemySaver.from_url(url) as saver:
        put(saver, config("ada/1"), {"x": 1})
        with pytest.raises(ConfigError, match="public one"):
            Governor(saver, key=public).forget("ada")
        assert len(list(saver.list(config("ada/1")))) == 1, "it is refused before anything goes"
        receipt = Receipt.from_json(Governor(saver, key=private).forget("ada").to_json())
        for key, said in ((public, "valid"), (private, "valid"), (another, "invalid")):
            checked = Governor(saver, key=key).verify(receipt)
            assert (checked.signature, checked.holds) == (said, said == "valid")
        for changed in ({"actor": "nobody"}, {"not_reached": ()}, {"signature": f"ed25519:{'00' * 64}"}):
            assert not replace(receipt, **changed).is_signed_by(public)
        with pytest.raises(ConfigError, match="ed25519"):
            Governor(saver, key=SECRET).verify(receipt)


def test_a_public_key_is_never_taken_for_a_secret(url: str) -> None:
    _, public = pair()
    with SQLAlchemySaver.from_url(url) as saver:
        receipt = Governor(saver, key=SECRET).forget("ada")
        assert receipt.is_signed_by(SECRET)
        forged = replace(receipt, signature=str(receipt.signature).replace("hmac-sha256", "ed25519"))
        assert not forged.is_signed_by(public)
        with pytest.raises(ConfigError, match="hmac-sha256"):
            receipt.is_signed_by(public)


def test_where_a_key_is_given_an_unsigned_receipt_does_not_hold(url: str) -> None:
    with SQLAlchemySaver.from_url(url) as saver:
        receipt = Governor(saver).forget("ada")
        assert Governor(saver).verify(receipt).holds
        checked = Governor(saver, key=SECRET).verify(receipt)
        assert (checked.signature, checked.holds) == ("absent", False)


def test_keys_that_cannot_be_used_are_refused() -> None:
    made = ec.generate_private_key(ec.SECP256R1()).private_bytes(PEM, PKCS8, serialization.NoEncryption())
    locked = Ed25519PrivateKey.generate().private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"password"))
    receipt = Receipt(
        id="r", operation="forget subject", subject=None, subject_digest="", time="", began="", actor="", database=""
    )
    for wrong in (made, locked, b"-----BEGIN PRIVATE KEY-----\nnone\n-----END PRIVATE KEY-----\n"):
        with pytest.raises(ConfigError, match="openssl genpkey"):
            receipt.signed(wrong)
