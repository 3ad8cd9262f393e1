"""What the commands are run on: a talk with an ideal memory, and tiny models in directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem import MemoryConfig, SteeredModel
from agentmem.nano.recipe.chatml import TEMPLATE
from tests.helpers.bpe import byte_bpe
from tests.helpers.cli_talk import Talk
from tests.helpers.core_models import build


@pytest.fixture
def talk(tmp_path: Path) -> Talk:
    return Talk(tmp_path / "threads.db")


def _tiny(directory: Path, adapter_seed: int) -> Path:
    """A random model with memory that chatters a few tokens: every second token ends a reply."""
    tokenizer = byte_bpe(["My favorite color is teal.", "What is my favorite color?"], TEMPLATE)
    model = build(
        "qwen3",
        seed=0,
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 2))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    SteeredModel.attach(model, config=MemoryConfig(rank=2), seed=adapter_seed).save(directory / "adapter")
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny(tmp_path_factory.mktemp("tiny"), adapter_seed=1)


@pytest.fixture(scope="session")
def other_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the same model, with other weights."""
    return _tiny(tmp_path_factory.mktemp("other"), adapter_seed=2) / "adapter"
