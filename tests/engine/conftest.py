"""Engines on tiny random models through the real code path: real tokenizer, real chat template, real hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from agentmem import Engine
from tests.helpers.bpe import REASONING_AND_CALLS, byte_bpe
from tests.helpers.core_models import attach_lively, build

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox says: hello there, how are you today? I am fine! Thanks.",
    "My favorite color is teal. The test command is pytest -q. Remember that, please.",
] * 20


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_bpe(CORPUS, TEMPLATE, tags=REASONING_AND_CALLS, vocab_size=360)


MakeEngine = Callable[..., Engine]


def _engines(tokenizer: Any) -> Iterator[MakeEngine]:
    """Builds engines with a random model and random nonzero memory weights; closes them at the end."""
    made: list[Engine] = []

    def make(
        *,
        memory: bool = True,
        seed: int = 0,
        model_seed: int = 0,
        limit: int = 4096,
        max_batch: int = 64,
        kv_cache_tokens: int = 8192,
        device: str = "cpu",
        **config: Any,
    ) -> Engine:
        model = build(
            "qwen3",
            seed=model_seed,
            vocab_size=len(tokenizer),
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=limit,
            initializer_range=0.4,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        with torch.no_grad():  # replies of readable text: no control tokens, no halves of characters
            for token in range(len(tokenizer)):
                text = tokenizer.decode([token])
                if not text.isprintable() or "\ufffd" in text or text.startswith("<"):
                    model.lm_head.weight[token] = 0.0
        steered = None
        if memory:
            steered = attach_lively(model, seed=seed, **config)
            steered.memory.to(device)
        model.to(device)
        engine = Engine(model, tokenizer, steered, name="tiny", max_batch=max_batch, kv_cache_tokens=kv_cache_tokens)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


make_engine = pytest.fixture(_engines)
make_engine_once = pytest.fixture(scope="module")(_engines)  # for what the tests of a file share
