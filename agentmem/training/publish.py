"""Uploading an adapter with its card to a hub of models: checked before training, done after it."""

from __future__ import annotations

from pathlib import Path

from agentmem.delta.adapter import AUTHORS_FILE, SAFETENSORS_FILE
from agentmem.delta.config import CONFIG_FILE
from agentmem.delta.published import CARD
from agentmem.errors import ConfigError, TrainingError

_LOGIN = "log in with a token that may write (`hf auth login`, or HF_TOKEN)"


def check_push(name: str) -> None:
    """Whether an upload can work: the name's form, and that the hub knows the token. Creates nothing.

    Raises:
        ConfigError: it cannot.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported, but not by name

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"push takes ORG/NAME; found {name!r}: {error}") from error
    if "/" not in name:
        raise ConfigError(f"push takes ORG/NAME; found {name!r}")
    if get_token() is None:
        raise ConfigError(f"push needs a token of the hub, and there is no token: {_LOGIN}")
    try:
        user = HfApi().whoami()
    except (HTTPError, OSError) as error:
        raise ConfigError(
            f"push to {name} cannot work: the hub cannot be reached, or does not know the token ({_shown(error)}); "
            f"{_LOGIN}, or train without push and upload later"
        ) from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(
            f"push to {name} needs a token that may write, and that of {user['name']} only reads; {_LOGIN}"
        )


def push(name: str, out: Path, predictions: str) -> None:
    """Upload the adapter, its card and its predictions; neither checkpoints nor the log.

    Args:
        name: the repository, ORG/NAME; it is created if it is not there.
        out: the directory of the run.
        predictions: the name of the file of predictions in it.

    Raises:
        TrainingError: it failed; the adapter lies in `out`.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi

    files = [SAFETENSORS_FILE, AUTHORS_FILE, CONFIG_FILE, CARD, predictions]
    try:
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=out, allow_patterns=files)
    except (HTTPError, OSError) as error:
        raise TrainingError(
            f"the adapter is in {out}, but it could not be uploaded to {name}: {_shown(error)}. The same command with "
            "--resume tries again; it trains nothing"
        ) from error


def _shown(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
