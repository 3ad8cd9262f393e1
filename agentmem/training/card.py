"""The model card of an adapter: a `README.md` in the hub's form that says what it is, what from, and how well it works.

The head is the hub's own YAML (base model, licence, data, tags). `agentmem.load` reads the base model's name from it
where an adapter has no fingerprint of its model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agentmem.delta.adapter import load_adapter
from agentmem.delta.published import CARD
from agentmem.training.contexts import SETUPS
from agentmem.training.conversations import SourceFile
from agentmem.training.predictions import ArmResults


class CardSource(Protocol):
    """What a card says of training data; every `agentmem.training.sources.Source` is one."""

    @property
    def name(self) -> str: ...
    @property
    def licence(self) -> str: ...
    @property
    def files(self) -> Sequence[SourceFile]: ...


@dataclass(frozen=True)
class CardFacts:
    """What a card says beyond what the adapter's own files say.

    Attributes:
        name: the adapter's name, as a title.
        base: hub id, name or directory of the model that it was trained for.
        licence: SPDX identifier of the adapter's licence; "other" where it is not known.
        sources: the data.
        recipe: options of the training run, as plain data.
        steps: training steps that were made.
        seconds: time that they took, in all sittings together.
        machine: what they ran on.
        results: the arms on held-out conversations; None = not measured.
        notes: further Markdown, put after the results (limits, a table of cells).
    """

    name: str
    base: str
    licence: str = "other"
    sources: Sequence[CardSource] = ()
    recipe: Mapping[str, Any] | None = None
    steps: int = 0
    seconds: float = 0.0
    machine: str = ""
    results: ArmResults | None = None
    notes: str = ""


def write_card(directory: str | Path, facts: CardFacts) -> Path:
    """Write the card of the adapter in a directory; returns the file.

    Raises:
        AdapterError, ConfigError: the directory has no adapter.
    """
    directory = Path(directory)
    file = directory / CARD
    file.write_text(model_card(directory, facts), "utf-8")
    return file


def model_card(directory: Path, facts: CardFacts) -> str:
    """The text of a card for the adapter in a directory."""
    import huggingface_hub

    adapter = load_adapter(directory)
    results = facts.results
    evaluated = [] if results is None else [_for_the_hub(results)]
    head = huggingface_hub.ModelCardData(
        base_model=facts.base,
        license=facts.licence.lower(),
        datasets=[source.name for source in facts.sources] or None,
        library_name="agentmem",
        tags=["agentmem", "delta-mem", "memory"],
        model_name=facts.name if evaluated else None,
        eval_results=evaluated or None,
    )
    parameters = sum(tensor.numel() for tensor in adapter.tensors.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors.values())
    base = f"`{facts.base}`" + (f", fingerprint `{adapter.base}`" if adapter.base else "")
    config = json.dumps(adapter.config.to_json(), indent=2)
    parts = {
        "Base model": f"{base}. The adapter is refused on any other model.",
        "Memory": f"{parameters:,} parameters ({size / 1e6:.1f} MB), fingerprint `{adapter.fingerprint}`.\n\n"
        f"```json\n{config}\n```",
        "Data": _data(facts.sources),
        "Recipe": _recipe(facts),
        "Results": _results(results),
        "Use": f'```python\nimport agentmem\n\nengine = agentmem.load("{facts.base}", adapter="{facts.name}")\n```',
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items() if text)
    about = (
        f"A memory for `{facts.base}`: a delta-mem adapter, to be used with agentmem. The model's own weights are not "
        "part of it and are not changed by it."
    )
    notes = f"\n\n{facts.notes.strip()}" if facts.notes.strip() else ""
    return f"---\n{head.to_yaml()}\n---\n\n# {facts.name}\n\n{about}\n\n{body}{notes}\n"


def _for_the_hub(results: ArmResults) -> Any:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type="held-out",
        dataset_name="held-out conversations",
        metric_type="accuracy",
        metric_name="right replies from memory alone",
        metric_value=round(results.share("memory").value, 4),
    )


def _data(sources: Sequence[CardSource]) -> str:
    lines = []
    for source in sources:
        licence = f", {source.licence}" if source.licence else ""
        lines.append(f"- **{source.name}**{licence}" + ("" if source.files else ": generated, no file"))
        for file in source.files:
            lines.append(f"  - `{Path(file.path).name}`, {file.bytes:,} bytes, sha256 `{file.sha256}`")
    return "\n".join(lines)


def _recipe(facts: CardFacts) -> str:
    made = []
    if facts.steps:
        hours = facts.seconds / 3600
        time = f"{hours:.1f} hours" if hours >= 1 else f"{facts.seconds / 60:.0f} minutes"
        on = f" on {facts.machine}" if facts.machine else ""
        made.append(f"{facts.steps:,} steps in {time}{on}.")
    if facts.recipe:
        made.append(f"```json\n{json.dumps(facts.recipe, indent=2, default=str)}\n```")
    return "\n\n".join(made)


def _results(results: ArmResults | None) -> str:
    if results is None:
        return "Not measured."
    lines = [
        "Share of right replies to questions about held-out conversations, greedy, with 95 % intervals over "
        "conversations. Nothing of the conversation is in the prompt, but for the last arm.",
        "",
        "| the model answers with | right | interval | questions |",
        "|---|---|---|---|",
    ]
    for arm in results.arms:
        share = results.share(arm)
        lines.append(
            f"| {SETUPS[arm].title} | {share.value:.3f} | {share.low:.3f} to {share.high:.3f} | {share.questions} |"
        )
    if {"memory", "zero", "foreign"} <= set(results.arms):
        gain = results.gain
        interval = f"{gain.low:.3f} to {gain.high:.3f}"
        lines += ["", f"Memory above the better of the two controls: {gain.value:.3f} ({interval})."]
    return "\n".join(lines)
