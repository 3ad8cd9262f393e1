"""nano's base, a small Qwen3, and how its weights are initialised.

To look anything up in its prompt a model needs a circuit of two layers: in one, each token records the token before it;
in the other, a token finds where it occurred before and predicts what followed there. With the library's initialisation
this circuit had not formed after 1,700 steps, and with a few thousand tokens larger initial weights did not help
either: rotary attention without biases needs a direction that all embeddings share before a head can look one token
back, and each embedding is seldom seen. So the circuit is built into the initial weights, roughly and among random
ones, and training does the rest: copying random tokens is learned in about 150 steps.

A word after a space and the same word after a quote or an underscore are two tokens. The model would have to learn word
by word that they are one. So such *twins* are tied: their embeddings differ by one direction, which is the same for all
pairs and stays fixed in training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

ROTARY_BASE = 10_000.0
HEADS = 4
_EMBEDDING_STD = 0.5
_SHARED = 2.0  # the first component of every embedding
_WIRED_HEADS = 3
_FAST_PAIRS = 6  # rotary pairs that rotate fast enough to tell one token back from two
_SPACE = 0.25  # the rough distance of twins in every dimension
_LAST_NORM = 0.4  # with embeddings this large, training would otherwise begin by shrinking the logits


def nano_config(tokenizer: PreTrainedTokenizerBase, *, width: int = 128, layers: int = 4) -> Qwen3Config:
    """The architecture: `layers` layers of size `width`, four heads, tied embeddings, rotary positions up to 8,192."""
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
    """A newly initialised model of at least two layers; the same seed gives the same weights.

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
    """Train twins together: from here on both embeddings of a pair get the sum of their gradients.

    With equal gradients an optimiser that treats every number alike (as AdamW does, moments and decay included) takes
    equal steps, so the difference within a pair stays what it was at the start.
    """
    if not twins:
        return
    bare, spaced = (torch.tensor(side) for side in zip(*twins, strict=True))

    def tied(gradient: Tensor) -> Tensor:
        both = gradient[bare] + gradient[spaced]
        return gradient.index_copy(0, bare, both).index_copy(0, spaced, both)

    model.get_input_embeddings().weight.register_hook(tied)


def _wire(model: Qwen3ForCausalLM, generator: torch.Generator) -> None:
    """Heads of the first layer record the previous token; heads of the second look for a record of this token."""
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
        # The record goes into directions of its own; the second layer's keys read those, its queries read the token.
        note = torch.randn(width, size, generator=generator) * width**-0.5
        note[0] = 0.0
        first.o_proj.weight[:, rows] = 1.5 * note
        second.q_proj.weight[rows] = first.v_proj.weight[rows]
        second.k_proj.weight[rows] = note.T
    first.q_norm.weight.fill_(3.0)
    second.q_norm.weight.fill_(2.0)


def _one_back(size: int) -> tuple[Tensor, Tensor]:
    """A query and a key, the same for every token, whose rotary product is largest one position back."""
    half = size // 2
    speed = ROTARY_BASE ** (-torch.arange(half) / half)
    pairs = (torch.arange(half) < _FAST_PAIRS).float()
    return torch.cat((pairs * speed.cos(), -pairs * speed.sin())), torch.cat((pairs, torch.zeros(half)))


def generation_config(config: Qwen3Config) -> GenerationConfig:
    """Greedy decoding that stops at either end token."""
    return GenerationConfig(
        do_sample=False,
        eos_token_id=[config.eos_token_id, config.pad_token_id],
        pad_token_id=config.pad_token_id,
        max_new_tokens=128,
    )
