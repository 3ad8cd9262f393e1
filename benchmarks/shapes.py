"""Models with random weights in given shapes, memory for them, and what steering may cost them.

Time does not depend on weights, so no download is needed. Bars are for a rank of 8 and writing by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from agentmem import MemoryConfig, SteeredModel
from agentmem.generation.cuda_graph import uses_graphs

VOCABULARY = 512
"""Of the random models on a CPU: the product with the vocabulary is the same for both, and would hide what differs."""

Case = tuple[str, int, int]
"""What is measured ("decode", "prefill" or "peak"), the batch, and the length of the prompt."""


@dataclass(frozen=True)
class Shape:
    """A Qwen3-like model and where it is measured.

    ``bars``: the least ratio of bare : steered of a decode or prefill, and by how many percent the peak memory of a
    prefill may be more; they are for devices of the type ``on``.
    """

    name: str
    layers: int
    width: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocabulary: int = VOCABULARY
    prompts: tuple[int, ...] = (1024,)
    prefills: tuple[int, ...] = (4096,)
    batches: tuple[int, ...] = (1,)
    on: str = "cpu"
    bars: Mapping[Case, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.layers} layers x {self.width}, {self.heads} heads ({self.key_heads} of keys) x "
            f"{self.head_dim}, inner {self.inner}, vocabulary {self.vocabulary:,}"
        )

    def model(self, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
        """With random weights."""
        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_dim,
            max_position_embeddings=40_960,
            tie_word_embeddings=True,
        )
        with torch.device(device):
            model = Qwen3ForCausalLM(config).to(dtype)
        return model.eval().requires_grad_(False)

    def judged(self, device: torch.device, write: str, rank: int, fixed: bool) -> bool:
        """Whether the bars are for this: a GPU with CUDA graphs, or one thread of a CPU and KV that grows."""
        if write != "TSW" or rank != 8 or device.type != self.on:
            return False
        return uses_graphs(device) if device.type == "cuda" else torch.get_num_threads() == 1 and not fixed


_LONG: dict[str, Any] = {
    "prompts": (1024, 4096, 16_384, 32_768), "prefills": (1024, 8192, 32_768), "batches": (1, 8, 32),
    "vocabulary": 151_936, "on": "cuda",
}  # fmt: skip
_BARS: dict[Case, float] = {
    ("decode", 1, 32_768): 0.90,
    ("decode", 32, 16_384): 0.96,
    ("prefill", 1, 8192): 0.98,
    ("prefill", 1, 32_768): 0.98,
    ("peak", 1, 1024): 0.5,
    ("peak", 1, 8192): 0.5,
    ("peak", 1, 32_768): 0.5,
}
SMALL = (
    Shape("12 x 1024", 12, 1024, 16, 8, 64, 3072, prompts=(256,),
          bars={("decode", 1, 256): 0.98, ("prefill", 1, 4096): 0.97}),
    Shape("36 x 64", 36, 64, 4, 2, 16, 192, prompts=(256,), prefills=(), bars={("decode", 1, 256): 0.80}),
)  # fmt: skip
REAL = (
    Shape("qwen3-4b", 36, 2560, 32, 8, 128, 9728, bars=_BARS, **_LONG),
    Shape("qwen3-8b", 36, 4096, 32, 8, 128, 12_288, **_LONG),
    Shape("smollm3-3b", 36, 2048, 16, 4, 128, 11_008, **(_LONG | {"vocabulary": 128_256})),
)
TINY = Shape("tiny", 2, 32, 2, 1, 16, 64, prompts=(16,), prefills=(32,))
"""To see that a command runs; it measures nothing of use."""

WRITES: dict[str, dict[str, Any]] = {
    "TSW": {"write_strategy": "token"},
    "SSW": {"write_strategy": "sentence"},
    "MSW": {"write_strategy": "token", "num_state_heads": 4},
}


def attached(model: Qwen3ForCausalLM, rank: int, write: str) -> SteeredModel:
    """The model with random memory weights."""
    with torch.inference_mode(False):
        steered = SteeredModel.attach(model, config=MemoryConfig(rank=rank, alpha=2.0 * rank, **WRITES[write]))
        for name, parameter in steered.memory.named_parameters():
            if "delta_" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
        steered.memory.requires_grad_(False)
    return steered
