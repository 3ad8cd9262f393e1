"""Known adapters, published or shipped with this package, and how to find out which model an adapter was made for.

Adapters that agentmem saved contain the fingerprint of their model. Others, such as the authors', fit every model of
the same shape: all that is known of their model is its name, from the table below or from other files in the adapter's
directory.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from agentmem.errors import AdapterError, MemoryWarning
from agentmem.text import parse_json

CARD, PEFT_FILE = "README.md", "adapter_config.json"
_BASE_MODEL = re.compile(r"^base_model:\s*(?:-\s*)?[\"']?([^\s\"'#\[\]]+)", re.MULTILINE)


@dataclass(frozen=True)
class PublishedAdapter:
    """An adapter on the hub, or one that ships with this package.

    Attributes:
        name: its hub id, or its name here.
        base: the hub id of the model that it was trained for.
        licence: licence of its weights.
        source: who made it.
        directory: where it is, if it ships with this package.
    """

    name: str
    base: str
    licence: str
    source: str
    directory: Path | None = None


_KNOWN = (
    PublishedAdapter(
        "declare-lab/delta-mem_qwen3_4b-instruct",
        "Qwen/Qwen3-4B-Instruct-2507",
        "CC-BY-4.0",
        "the authors of delta-mem",
    ),
    PublishedAdapter(
        "smollm2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Apache-2.0",
        "agentmem",
        Path(__file__).parents[1] / "smollm2" / "adapter",
    ),
)


PUBLISHED = tuple(adapter for adapter in _KNOWN if adapter.directory is None or adapter.directory.is_dir())


def find_published(name: str) -> PublishedAdapter | None:
    """The published adapter with this hub id, or with this last part of one."""
    return next((adapter for adapter in PUBLISHED if name in (adapter.name, _last_part(adapter.name))), None)


def published_for(*names: str) -> PublishedAdapter | None:
    """The first known adapter for a model of one of these names; a copy by another name may have been trained on."""
    lasts = {_last_part(name).lower() for name in names if name}
    return next((adapter for adapter in PUBLISHED if _last_part(adapter.base).lower() in lasts), None)


def advice(model: str) -> str:
    """A text that names the published adapters for a model, or all published ones if there are none for it."""
    fitting = [adapter for adapter in PUBLISHED if is_made_from(model, adapter.base)]
    listed = "; ".join(f"{a.name!r} for {a.base} ({a.licence}, by {a.source})" for a in fitting or PUBLISHED)
    return f"published for it: {listed}" if fitting else f"published ones: {listed}"


def base_name(directory: str | Path) -> str | None:
    """The model's name in an adapter's directory: in PEFT's config, or in the head of the card; None if in neither."""
    directory = Path(directory)
    try:
        name = parse_json((directory / PEFT_FILE).read_text("utf-8")).get("base_model_name_or_path")
        if isinstance(name, str) and name:
            return name
    except (OSError, ValueError, AttributeError):
        pass  # missing or malformed: the card may name it
    try:
        head = (directory / CARD).read_text("utf-8").split("\n---", 1)[0]
    except (OSError, ValueError):
        return None
    match = _BASE_MODEL.search(head) if head.startswith("---") else None
    return None if match is None else match[1]


def is_made_from(model: str, base: str) -> bool:
    """Whether a model's hub id or directory is named after a base: the same name, or one that contains it.

    The names of quantised and converted copies contain it: `unsloth/Qwen3-4B-Instruct-2507-bnb-4bit`.
    """
    return _last_part(base).lower() in _last_part(model).lower()


def check_base(model: str, directory: Path, name: str) -> None:
    """Compare the names of model and adapter, if the adapter has no fingerprint of its model.

    Args:
        model: the model's hub id or directory; empty if it is not known.
        directory: where the adapter's files are.
        name: the adapter as the caller named it.

    Raises:
        AdapterError: both name a model, and not the same one. A directory's own name proves nothing, so in that case,
            and if there is no name, it is only a `MemoryWarning`.
    """
    published = find_published(name)
    base = base_name(directory) if published is None else published.base
    if base is None:
        problem = (
            f"the adapter in {directory} does not say which model it was made for; it fits every model of that shape, "
            "and steers all but one at random"
        )
    else:
        proves_nothing = not model or Path(model).is_dir()
        names = [model, recorded_name(Path(model))] if proves_nothing else [model]
        if any(is_made_from(found, base) for found in names):
            return
        problem = f"the adapter {name!r} was made for {base}, the model is {model or 'one without a name'}"
        if not proves_nothing:
            raise AdapterError(f"{problem}; load that model, or an adapter that was trained for this one")
    warnings.warn(
        f"{problem}. If they belong together, save the adapter once with agentmem.load(...).steered.save(directory): "
        "from then on it carries the fingerprint of its model, and any other is refused",
        MemoryWarning,
        stacklevel=3,
    )


def recorded_name(model: Path) -> str:
    """The hub id that a model's directory records: in what `make smollm2` notes, or in a config that older versions of
    transformers wrote; empty if there is none."""
    for file, key in (("source.json", "hub_id"), ("config.json", "_name_or_path")):
        try:
            name = parse_json((model / file).read_text("utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(name, str):
            return name
    return ""


def _last_part(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
