"""A static LoRA: what a memory is compared with that has as many parameters and the same data, but keeps nothing.

It is trained in the same loop on the same examples, by peft, on the projections that the memory would correct. What it
learns is all that can be learned without a state: the form of replies, and which values are likely.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentmem.delta.config import MemoryConfig
from agentmem.delta.model import SteeredModel
from agentmem.engine import Engine
from agentmem.errors import AdapterError, MissingExtraError

_WEIGHTS = "adapter_model.safetensors"
_SCALE = 2  # alpha / rank, as of the memory
_TINY = 1e-6


class StaticStep(nn.Module):
    """The loss of a batch of examples for a model with a static LoRA, which sees what the prompts show.

    Args:
        model: of peft, with the LoRA.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss`, the mean cross-entropy by weight, and `sum` and `weight`, as those of a `MemoryStep`.

        Args:
            batch: of `examples.collate` with `joined` False.
        """
        layouts = [*batch["passes"], *([] if batch["asks"] is None else [batch["asks"]])]
        targeted = [layout for layout in layouts if bool((layout["weights"] > 0).any())]
        total = torch.stack([self._loss(layout) for layout in targeted]).sum()
        weight = torch.stack([layout["weights"].sum() for layout in layouts]).sum()
        return {"loss": total / weight.clamp_min(_TINY), "sum": total, "weight": weight}

    def _loss(self, layout: Mapping[str, Any]) -> Tensor:
        """The weighted sum of cross-entropies of a layout [N, T]."""
        weights = layout["weights"][:, 1:]
        counts = weights > 0
        base = self.model.get_base_model()
        hidden = base.get_decoder()(
            input_ids=layout["ids"],
            attention_mask=layout["mask"],
            position_ids=layout["positions"],
            use_cache=False,
        ).last_hidden_state
        logits = base.get_output_embeddings()(hidden[:, :-1][counts]).float()
        losses = F.cross_entropy(logits, layout["ids"][:, 1:][counts], reduction="none")
        total: Tensor = (losses * weights[counts]).sum()
        return total


def attach_static(model: Any, memory: MemoryConfig, seed: int) -> Any:
    """The model of peft with a new LoRA that has about as many parameters as a memory would have.

    Args:
        model: the frozen model.
        memory: options of the memory that it stands in for: its layers and projections get the LoRA.
        seed: of the new weights.

    Raises:
        MissingExtraError: peft is not installed.
        UnsupportedModelError: see `SteeredModel.attach`.
    """
    peft = _import_peft()
    steered = SteeredModel.attach(model, config=memory, seed=seed)
    wanted = sum(parameter.numel() for parameter in steered.memory.parameters())
    layers, heads = set(steered.layers), memory.delta_heads
    steered.detach()
    names = [name for name, _ in model.named_modules() if _is_target(name, layers, heads)]
    modules = dict(model.named_modules())
    each = sum(modules[name].in_features + modules[name].out_features for name in names)
    rank = max(1, round(wanted / each))
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank, lora_alpha=_SCALE * rank, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def static_parameters(model: Any) -> int:
    """How many parameters of a model of peft are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class StaticAdapter:
    """A trained static LoRA in a directory.

    Attributes:
        directory: where peft saved it.
        fingerprint: SHA-256 of its weights.
    """

    directory: Path
    fingerprint: str

    @classmethod
    def find(cls, directory: Path) -> StaticAdapter:
        """The LoRA in a directory.

        Raises:
            AdapterError: there is none.
            MissingExtraError: peft is not installed.
        """
        _import_peft()
        weights = directory / _WEIGHTS
        if not weights.is_file() or not (directory / "adapter_config.json").is_file():
            raise AdapterError(
                f"a static LoRA is a directory with adapter_config.json and {_WEIGHTS}; {directory} has not both; "
                "train one: agentmem train --static"
            )
        return cls(directory, hashlib.sha256(weights.read_bytes()).hexdigest())

    def into(self, engine: Engine) -> Engine:
        """An engine for the model of another one, with the LoRA merged into its weights; the other is closed.

        Raises:
            AdapterError: the LoRA was made for another model.
        """
        peft = _import_peft()
        engine.close()
        try:
            merged = peft.PeftModel.from_pretrained(engine.model, str(self.directory)).merge_and_unload()
        except (ValueError, RuntimeError, KeyError) as error:
            raise AdapterError(f"the static LoRA in {self.directory} does not fit {engine.name}: {error}") from error
        merged.requires_grad_(False)
        return Engine(merged, engine.tokenizer, name=engine.name)


def _is_target(name: str, layers: set[int], heads: Sequence[str]) -> bool:
    parts = name.split(".")
    numbers = [int(part) for part in parts if part.isdecimal()]
    return bool(numbers) and numbers[-1] in layers and parts[-1] in {f"{head}_proj" for head in heads}


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "train") from None
    return peft
