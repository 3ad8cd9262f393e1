"""A model directory with random weights and a random memory, which can chat about anything and knows nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentmem import MemoryConfig, SteeredModel
from agentmem.nano.recipe.chatml import TEMPLATE
from agentmem.training.facts import wordings as say
from tests.helpers.bpe import byte_bpe
from tests.helpers.core_models import build


def save_chatterer(directory: Path, *, adapter_seed: int = 1, **config: Any) -> Path:
    """Write the model, its tokenizer and its adapter; `config`: changes of the model's config."""
    corpus = [text for pair in say.SMALL_TALK for text in pair] + [*say.TELL, *say.ASK]
    tokenizer = byte_bpe(corpus, TEMPLATE)
    nothing = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = build("qwen3", vocab_size=len(tokenizer), **sizes, **heads, **nothing, **config)
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 2))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    SteeredModel.attach(model, config=MemoryConfig(rank=2), seed=adapter_seed).save(directory / "adapter")
    return directory
