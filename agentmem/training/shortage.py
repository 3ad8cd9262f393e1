"""What to do where memory runs out: which options help, and by how much. Sizes are estimates for usual transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from agentmem.delta.config import MemoryConfig
from agentmem.errors import AgentMemError, TrainingError
from agentmem.training.config import TrainConfig
from agentmem.training.examples import Example

_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "8bit": 8, "4bit": 4}


@contextmanager
def explained_shortage(
    config: TrainConfig, memory: MemoryConfig, shape: Any, examples: Sequence[Example]
) -> Iterator[None]:
    """Say what helps where memory runs out in a step.

    Args:
        config, memory: of the run.
        shape: the config of the language model.
        examples: some of the run's.

    Raises:
        TrainingError: memory ran out; names the options, and what a step keeps with each.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, AgentMemError) or not _short(error):
            raise
        helps = _of_a_step(config, memory, shape, examples)
        raise TrainingError(f"{helps}. What was saved is whole ({_first_line(error)})") from error


@contextmanager
def explained_shortage_of_weights(config: TrainConfig, parameters: int) -> Iterator[None]:
    """Say what helps where memory runs out while the model's weights are loaded.

    Args:
        config: of the run.
        parameters: how many the model has.

    Raises:
        TrainingError: memory ran out; names the sizes of the weights in other forms.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, AgentMemError) or not _short(error):
            raise
        now = _BITS.get(config.quantize or config.dtype, 16 if torch.cuda.is_available() else 32)
        smaller = {"dtype: bfloat16": 16, "quantize: 8bit": 8, "quantize: 4bit": 4}
        helps = [f"{name} ({_size(parameters * bits / 8)})" for name, bits in smaller.items() if bits < now]
        more = f"What helps: {', '.join(helps)}, or a device with more" if helps else "Take a device with more"
        raise TrainingError(
            f"memory ran out while the model's weights were loaded: {parameters:,} parameters take about "
            f"{_size(parameters * now / 8)}. {more} ({_first_line(error)})"
        ) from error


def _short(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _of_a_step(config: TrainConfig, memory: MemoryConfig, shape: Any, examples: Sequence[Example]) -> str:
    sizes = [[len(each.ids) for each in (*example.passes, *example.asks)] for example in examples]
    tokens = sum(map(sum, sizes)) / len(sizes)
    # Gradients reach no further down than the lowest layer with memory.
    layers = shape.num_hidden_layers - min(memory.target_layers, default=0)
    # Norms, queries, keys, values and attention outputs in the hidden size; gate, up and their product in the MLP's.
    each = layers * (8 * shape.hidden_size + 3 * getattr(shape, "intermediate_size", 4 * shape.hidden_size))
    each *= 4 if config.dtype == "float32" or (config.dtype == "auto" and not torch.cuda.is_available()) else 2
    whole = config.batch_size * tokens * each
    one_pass = whole * sum(map(max, sizes)) / sum(map(sum, sizes))
    passes = max(map(len, sizes))
    helps = []
    if config.batch_size > 1:
        half = config.batch_size // 2
        helps.append(
            f"batch_size: {half} needs {_size(whole * half / config.batch_size)} (with accumulate: "
            f"{config.accumulate * config.batch_size // half} the steps stay the same)"
        )
    if not config.gradient_checkpointing:
        helps.append(f"gradient_checkpointing: true about {_size(one_pass)}, and a third more time")
    shorter = max(1, min(passes, config.truncate or passes) // 2)
    if shorter < (config.truncate or passes):
        helps.append(f"truncate: {shorter} about {_size(whole * shorter / passes)}")
    return (
        f"memory ran out: {config.batch_size} conversations of about {tokens:.0f} tokens keep about "
        f"{_size(whole)} for the gradient, on each device. What helps: "
        f"{'; '.join(helps) or 'shorter conversations, or a device with more memory'}"
    )


def _size(bytes_: float) -> str:
    return f"{bytes_ / 1e9:.1f} GB" if bytes_ >= 1e8 else f"{bytes_ / 1e6:.0f} MB"
