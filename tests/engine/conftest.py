"""Engines on tiny random models through the real code path: real tokenizer, real chat template, real hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from agentmem import Engine, MemoryConfig, SteeredModel

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
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_tokens([AddedToken(t, special=False) for t in ("<tool_call>", "</tool_call>", "<think>", "</think>")])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = TEMPLATE
    return made


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tokenizer: Any) -> Iterator[MakeEngine]:
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
        torch.manual_seed(model_seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                max_position_embeddings=limit,
                initializer_range=0.4,
                eos_token_id=tokenizer.eos_token_id,
                attn_implementation="sdpa",
            )
        )
        with torch.no_grad():  # replies of readable text: no control tokens, no halves of characters
            for token in range(len(tokenizer)):
                text = tokenizer.decode([token])
                if not text.isprintable() or "\ufffd" in text or text.startswith("<"):
                    model.lm_head.weight[token] = 0.0
        steered = None
        if memory:
            steered = SteeredModel.attach(model, config=MemoryConfig(**({"rank": 4} | config)), seed=seed)
            generator = torch.Generator().manual_seed(seed + 1)
            with torch.no_grad():
                for name, parameter in steered.memory.named_parameters():
                    if "delta_" in name or name.endswith("beta_proj"):
                        parameter.normal_(0.0, 0.3, generator=generator)
                steered.memory.to(device)
        model.to(device)  # type: ignore[arg-type]
        engine = Engine(model, tokenizer, steered, name="tiny", max_batch=max_batch, kv_cache_tokens=kv_cache_tokens)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()
