"""nano's base: a small Qwen3, and how its weights start.

A model has to find a circuit of two layers before it can look anything up in its prompt: one layer in which each token
takes note of the token before it, and one in which a token finds the place where it stood before and says what
followed. With the library's start it had not been found after 1,700 steps, and with a few thousand tokens not by
larger starting weights either: rotary attention without biases needs a direction that all embeddings share before a
head can look one token back, and each embedding is seldom met. So the circuit is wired into the start, roughly and
among random weights, and training does the rest: copying random tokens is learned in about 150 steps.

A word after a space and the same word after a quote or an underscore are two tokens. That they are one word would have
to be learned word by word; so such *twins* are tied: one direction, the same for all pairs, is all that their
embeddings differ by, at the start and ever after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

ROTARY_BASE = 10_000.0
HEADS = 4
_EMBEDDING_STD = 0.5
_SHARED = 2.0  # what every embedding has in its first dimension
_WIRED_HEADS = 3
_FAST_PAIRS = 6  # rotary pairs quick enough to tell one token back from two
_SPACE = 0.25  # how far twins lie apart in every dimension, roughly
_LAST_NORM = 0.4  # or, with embeddings this large, training begins with calming the logits down


def nano_config(tokenizer: PreTrainedTokenizerBase, *, width: int = 128, layers: int = 4) -> Qwen3Config:
    """The architecture: `layers` layers of `width`, four heads, tied embeddings, rotary positions up to 8,192."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=width // HEADS,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        use_cache=True,
    )


def fresh_model(config: Qwen3Config, seed: int, twins: Sequence[tuple[int, int]] = ()) -> Qwen3ForCausalLM:
    """A model at its start, of at least two layers; the same seed gives the same weights.

    `twins` are pairs of tokens (bare, after a space) whose embeddings start as `tie_twins` keeps them.
    """
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, _EMBEDDING_STD, generator=generator)
            elif isinstance(module, nn.Linear) and module.weight is not model.get_input_embeddings().weight:
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
        if twins:
            embeddings = model.get_input_embeddings().weight
            bare, spaced = map(list, zip(*twins, strict=True))
            space = torch.empty(embeddings.shape[1]).normal_(0.0, _SPACE, generator=generator)
            embeddings[spaced] = embeddings[bare] + space
        _wire(model, generator)
        model.model.norm.weight.fill_(_LAST_NORM)
    model.generation_config = generation_config(config)
    return model


def tie_twins(model: Qwen3ForCausalLM, twins: Sequence[tuple[int, int]]) -> None:
    """Train twins as one: from here on both embeddings of a pair get the sum of their gradients.

    Equal gradients are equal steps of an optimiser that treats every number alike (AdamW does, moments and decay
    included), so what a pair differs by stays what it was at the start.
    """
    if not twins:
        return
    bare, spaced = (torch.tensor(side) for side in zip(*twins, strict=True))

    def tied(gradient: Tensor) -> Tensor:
        both = gradient[bare] + gradient[spaced]
        return gradient.index_copy(0, bare, both).index_copy(0, spaced, both)

    model.get_input_embeddings().weight.register_hook(tied)


def _wire(model: Qwen3ForCausalLM, generator: torch.Generator) -> None:
    """Heads of the first layer note the token before; heads of the second find where that note is of this token."""
    width, size = model.config.hidden_size, model.config.head_dim
    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    model.get_input_embeddings().weight[:, 0] = _SHARED
    query, key = _one_back(size)
    for head in range(_WIRED_HEADS):
        rows = slice(head * size, (head + 1) * size)
        for projection, phase in ((first.q_proj, query), (first.k_proj, key)):
            projection.weight[rows] = 0.0
            projection.weight[rows, 0] = phase
        first.v_proj.weight[rows, 0] = 0.0
        # The note goes into directions of its own; the second layer's keys read those, its queries read the token.
        note = torch.randn(width, size, generator=generator) * width**-0.5
        note[0] = 0.0
        first.o_proj.weight[:, rows] = 1.5 * note
        second.q_proj.weight[rows] = first.v_proj.weight[rows]
        second.k_proj.weight[rows] = note.T
    first.q_norm.weight.fill_(3.0)
    second.q_norm.weight.fill_(2.0)


def _one_back(size: int) -> tuple[Tensor, Tensor]:
    """Query and key, the same for every token, whose rotary product is largest one position back."""
    half = size // 2
    speed = ROTARY_BASE ** (-torch.arange(half) / half)
    pairs = (torch.arange(half) < _FAST_PAIRS).float()
    return torch.cat((pairs * speed.cos(), -pairs * speed.sin())), torch.cat((pairs, torch.zeros(half)))


def generation_config(config: Qwen3Config) -> GenerationConfig:
    """Greedy decoding that ends at either end token."""
    return GenerationConfig(
        do_sample=False,
        eos_token_id=[config.eos_token_id, config.pad_token_id],
        pad_token_id=config.pad_token_id,
        max_new_tokens=128,
    )
