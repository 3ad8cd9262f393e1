"""The command that trains: `agentmem train`, and `python -m agentmem.training` for launchers of several processes."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Mapping
from dataclasses import Field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from agentmem.errors import ConfigError, MissingExtraError
from agentmem.training.config import TrainConfig, is_union, key_types

ACCELERATE = Path(__file__).parent / "accelerate"
"""The folder of accelerate's configs that come with agentmem."""


def train_command(
    config: Annotated[
        Path | None, typer.Option("--config", help="A YAML file of these keys; options go over it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print one example as it is written and read.")] = False,
    accelerate_config: Annotated[
        str | None, typer.Option(help="Print the path of a config for `accelerate launch`: ddp, zero2 or fsdp.")
    ] = None,
    **keys: Any,
) -> None:
    """Train a memory for your own model on your own conversations."""
    if accelerate_config is not None:
        typer.echo(accelerate_path(accelerate_config))
        return
    made = from_options(config, keys)
    if find_spec("accelerate") is None:
        raise MissingExtraError("accelerate", "train")
    if made.quantize is None:
        # The Trainer imports bitsandbytes, which warns of a kernel for weights in 4 bits.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from agentmem.training import run

    if dry_run:
        run.dry_run(made)
        return
    try:
        result = run.train(made)
    except KeyboardInterrupt:  # before the first step, or a second time
        typer.echo("interrupted; the same command with --resume goes on from what was saved", err=True)
        raise typer.Exit(1) from None
    if not result.finished:
        typer.echo(f"stopped after step {result.steps}; the same command with --resume goes on")
        raise typer.Exit(1)
    typer.echo(f"{result.out}: the adapter, its card and its log")


def accelerate_path(name: str) -> Path:
    """The path of one of accelerate's configs that come with agentmem.

    Raises:
        ConfigError: there is none of that name.
    """
    path = ACCELERATE / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in ACCELERATE.glob("*.yaml")))
        raise ConfigError(f"accelerate_config takes {names}; found {name!r}")
    return path


def options() -> list[inspect.Parameter]:
    """The parameters of a typer command: an option for each key, None where it is not given."""
    found = []
    for each in fields(TrainConfig):
        hint = key_types()[each.name]
        kind: Any = hint
        if is_union(hint):
            (kind,) = (part for part in get_args(hint) if part is not types.NoneType)
        option = typer.Option(
            f"--{each.name.replace('_', '-')}" + (f"/--no-{each.name.replace('_', '-')}" if kind is bool else ""),
            help=f"{each.metadata['help']} {_shown_default(each)}".rstrip(),
            rich_help_panel=each.metadata["group"],
            metavar="KEY=VALUE" if get_origin(kind) is Mapping else None,
        )
        if get_origin(kind) is Mapping:
            kind = list[str]
        elif get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis:
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
        annotation = Annotated[kind | None, option]
        found.append(inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return found


def from_options(path: Path | None, given: Mapping[str, Any]) -> TrainConfig:
    """The config of a command line: a YAML file, and over it the options that are not None.

    Raises:
        ConfigError: see `TrainConfig.read`; or an option of the form KEY=VALUE has another form.
    """
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if get_origin(key_types()[name]) is Mapping:
            value = dict(_pair(name, text) for text in value)
        changes[name] = value
    return TrainConfig.read(path, changes)


def _shown_default(each: Field[Any]) -> str:
    return "" if each.default in ("", None, (), False) or each.default_factory is dict else f"[{_plain(each.default)}]"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _pair(name: str, text: str) -> tuple[str, Any]:
    import yaml

    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"--{name} takes KEY=VALUE, rank=16 for example; found {text!r}")
    return key.strip(), yaml.safe_load(value)


# typer reads the options from here: the function's own, and one for each key.
_own = [p for p in inspect.signature(train_command, eval_str=True).parameters.values() if p.name != "keys"]
train_command.__signature__ = inspect.Signature([*_own, *options()])  # type: ignore[attr-defined]
