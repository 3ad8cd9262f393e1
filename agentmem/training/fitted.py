"""Starting weights for an adapter: a copier, or weights that are fitted to the frozen model.

From random weights an adapter first has to find out what to associate with what; the loss stays on a plateau until it
does. `start_fitted` looks that up in the model instead. In example conversations the same value occurs twice: where it
is written, and where a reply recalls it. From the bare model's hidden states at these places linear algebra gives
starting weights for every layer with memory:

    keys, queries   the directions in which a written value's token and the reply's token before it agree most
                    (canonical correlations); with two heads the first learns this for a value's first token, the second
                    for later tokens, which are found by the token before them. Then they are trained to find the right
                    token among all that were written (`addressing`)
    gates           a regression that tells values from other written tokens, trained on in the same way
    values          a regression from the written token's hidden state to its row of the vocabulary matrix, of which
                    every layer and head carries a random slice; the output weights put the slices back together

Training then only has to improve on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentmem.delta.layer import LayerMemory
from agentmem.delta.model import SteeredModel
from agentmem.errors import ConfigError, DataError
from agentmem.training.addressing import Places, train_addressing
from agentmem.training.examples import Example, Pass
from agentmem.training.hidden import hidden_states

_KEY_RIDGE, _RIDGE = 0.4, 0.02
"""Share of the mean variance that is added to every direction's, so that rare directions are not trusted. Keys need
most: with .02 a held-out value was told from three others in 76 of 100 cases by layer 17 of SmolLM2, with .4 in 84."""
_OTHERS = 32  # tokens of each pass, at most, that are taken as examples of what is no value
_RANDOM_ROWS, _RANDOM_LENGTH, _SKIPPED = 500, 48, 4
"""Rows of random tokens, from which values are learned too: there are never enough different ones in conversations.
The first tokens of a row are special to many models and left out."""
_MEASURED = 64  # predicting tokens, at most, on which the scale of hidden states is measured
_KEY_SCALE = 0.3  # standard deviation of keys and queries before tanh, where it is still nearly linear
_GATE_VALUE, _GATE_OTHER = 3.0, -5.0  # the gate's logit at values, and elsewhere
_RAISE = 10.0  # by how much recalling a value raises its token's logit


def start_as_copier(steered: SteeredModel, gain: float = 0.3) -> None:
    """Initialise a new adapter so that reading a token gives back what was written for it, in place.

    Memory keys start equal to memory queries, and the correction of o as `gain` times the transpose of the memory
    value: a read then favours the very token that was written, and training only has to learn which tokens should
    match. From outputs at zero it has to learn both at once.
    """
    with torch.no_grad():
        for module in _modules(steered):
            module.get_parameter("memory_k_proj").copy_(module.get_parameter("memory_q_proj"))
            module.get_parameter("delta_o_proj").copy_(gain * module.get_parameter("memory_v_proj").T)


@dataclass(frozen=True)
class _Recalls:
    """What the questions of an example recall.

    Attributes:
        pairs: (pass, position of a written value's token, question, position of the token that predicts it, whether it
            is the value's first token).
    """

    example: Example
    pairs: tuple[tuple[int, int, int, int, bool], ...]


@dataclass
class _Features:
    """Hidden states of one layer, each [n, D].

    Attributes:
        kept: of written tokens, those of values and others.
        asked: of the tokens in replies that predict a value's token.
    """

    kept: Tensor
    asked: Tensor


@torch.no_grad()
def start_fitted(steered: SteeredModel, examples: Sequence[Example], pad: int, *, seed: int = 0, rows: int = 32) -> int:
    """Fit the starting weights of a new adapter to its model, in place.

    Args:
        steered: the model with new memory that corrects o.
        examples: conversations whose questions recall values that were written; a thousand or more.
        pad: the token id of padding.
        seed: draws the slices.
        rows: how many passes run through the model together.

    Returns:
        How many recalled tokens were found.

    Raises:
        ConfigError: the adapter does not correct o.
        DataError: too few recalled tokens were found.
    """
    config = steered.config
    recalls = _all_recalls(steered, examples)
    count = sum(len(each.pairs) for each in recalls)
    if count < 2 * config.rank:
        raise DataError(
            f"a fitted start needs at least {2 * config.rank} values that a reply recalls from what was written; found "
            f"{count} in {len(examples)} conversations. Give more data, or start: copier"
        )
    places, features = _collect(steered, recalls, pad, rows)
    random = _random_tokens(steered, pad, rows)
    _fit(steered, places, features, random, _residual_scale(steered, recalls, pad, rows), seed)
    return count


@torch.no_grad()
def refit_addresses(
    steered: SteeredModel, examples: Sequence[Example], pad: int, *, seed: int = 0, rows: int = 32
) -> int:
    """Train the keys and queries of a trained adapter to find what replies recall, in place.

    A training step moves them by what it does to replies, through everything above them; here the right token is named
    to them. All else stays, and they move by a tenth of their size.

    Args:
        steered: the model with its memory.
        examples: conversations whose questions recall values that were written; two thousand or more.
        pad: the token id of padding.
        seed: draws the order of examples.
        rows: how many passes run through the model together.

    Returns:
        How many recalled tokens were found.

    Raises:
        ConfigError: the adapter does not correct o.
        DataError: no recalled token was found.
    """
    recalls = _all_recalls(steered, examples)
    count = sum(len(each.pairs) for each in recalls)
    if not count:
        raise DataError(
            "keys and queries are learned from values that replies recall from what was written; found none in "
            f"{len(examples)} conversations. Give other data, or refit_conversations: 0"
        )
    places, features = _collect(steered, recalls, pad, rows)
    train_addressing(
        _modules(steered),
        [layer.kept for layer in features],
        [layer.asked for layer in features],
        places,
        seed=seed,
        effects=_effects(_modules(steered)),
    )
    return count


def _effects(modules: Sequence[LayerMemory]) -> Tensor:
    """How large a correction of o each head makes of what it finds, [L, H], with a mean of 1."""
    effects = []
    for module in modules:
        heads, rank = module.config.num_state_heads, module.config.rank
        output = module.get_parameter("delta_o_proj").detach().float().cpu().view(-1, heads, rank)  # [D, H, r]
        values = module.get_parameter("memory_v_proj").detach().float().cpu().view(heads, rank, -1)  # [H, r, D]
        effects.append(torch.stack([torch.linalg.norm(output[:, head] @ values[head]) for head in range(heads)]))
    found = torch.stack(effects)
    return found / found.mean().clamp_min(1e-6)


def _fit(
    steered: SteeredModel,
    places: Places,
    features: Sequence[_Features],
    random: tuple[Tensor, Sequence[Tensor]],
    residual: float,
    seed: int,
) -> None:
    """Fit all layers; `residual` is the root mean square of what enters the last norm."""
    config = steered.config
    codes, decoder = _token_codes(steered)
    generator = torch.Generator().manual_seed(seed)
    modules = _modules(steered)
    # How much of a value's code each head of each layer recalls, [L, H]; an output counts as much as its head recalls.
    recalled = torch.stack(
        [
            _fit_layer(module, layer, places, (random[0], states), codes, generator)
            for module, layer, states in zip(modules, features, random[1], strict=True)
        ]
    )
    shares = train_addressing(
        modules, [layer.kept for layer in features], [layer.asked for layer in features], places, seed=seed
    )
    # A recalled code raises its token's logit by its squared length, `rank` in every slice, over the last norm's scale.
    kinds = _kinds(places, config.num_state_heads, config.rank)
    raised = torch.zeros(config.num_state_heads)
    for kind in set(kinds.tolist()):
        raised[kinds == kind] = config.rank * recalled[:, kinds == kind].square().sum()
    gain = shares * recalled * (_RAISE * residual / (config.scale * raised.clamp_min(1e-6)))
    for module, heads in zip(modules, gain, strict=True):
        module.get_parameter("delta_o_proj").copy_(decoder @ _by_head(module, heads))


def _by_head(module: LayerMemory, factors: Tensor) -> Tensor:
    """The slices that a layer was given (in its output weight, [D, H r]), each head's times its factor [H]."""
    slices = module.get_parameter("delta_o_proj")
    return slices * factors.repeat_interleave(module.config.rank).to(slices)


def _kinds(places: Places, heads: int, rank: int) -> Tensor:
    """Which tokens of values each head is for, [H]: 0 = all, 1 = first ones, 2 = later ones (the second half of heads).

    All heads are for all of them if there is one head, or too few values have several tokens.
    """
    later = heads // 2 if int((~places.first).sum()) >= 4 * rank else 0
    if not later:
        return torch.zeros(heads)
    return torch.tensor([2 if head >= heads - later else 1 for head in range(heads)])


def _token_codes(steered: SteeredModel) -> tuple[Tensor, Tensor]:
    """Codes of all tokens [V, D] with unit covariance, and the matrix [D, D] that turns a code into a hidden state.

    Rows of the vocabulary matrix have much in common, which tells no token from another; codes have not. A hidden state
    made from a code raises the logit of each token by the product of both codes, and so of other tokens hardly.
    """
    head = steered.model.get_output_embeddings().weight.detach().float()
    norm = _final_norm(steered)
    rows = head if norm is None else head * norm
    rows = rows - rows.mean(0)
    root = _inverse_root((rows.T @ rows / len(rows)).double()).float()
    return rows @ root, root


def _fit_layer(
    module: LayerMemory,
    layer: _Features,
    places: Places,
    random: tuple[Tensor, Tensor],
    codes: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Fit all but the output of one layer, whose weight is left holding the slices of codes [V, D], transposed.

    Returns:
        How much of a value's code each head recalls, measured on values that the keys were not fitted to, [H].
    """
    config, dim = module.config, layer.kept.shape[1]
    rank, heads = config.rank, config.num_state_heads
    kept, answers = layer.kept.float(), layer.asked.float()
    values, others = kept[places.found], kept[~places.values]
    written, asked = _Centred.of(values, others), _Centred.of(answers, answers)
    slices = torch.linalg.qr(torch.randn(dim, rank * heads, generator=generator))[0].T  # [H r, D]
    known = torch.cat([written.pairs, written.without(random[1].float())])
    found = places.tokens[places.found]
    tokens = torch.cat([found, random[0]])
    recalled = []
    for head, kind in enumerate(_kinds(places, heads, rank).tolist()):
        part = slice(head * rank, (head + 1) * rank)
        mine = torch.ones_like(places.first) if kind == 0 else places.first if kind == 1 else ~places.first
        x, y = written.pairs[mine], asked.pairs[mine]
        fold = len(x) * 4 // 5
        keys, queries = _correlated(x[:fold], y[:fold], rank)
        _set(module, "memory_k_proj", part, written.weights(keys))
        _set(module, "memory_q_proj", part, asked.weights(queries))
        coded = _ridge(known, codes[tokens] @ slices[part].T)
        _set(module, "memory_v_proj", part, written.weights(coded))
        weight, bias = _gate(values[mine], torch.cat([others, values[~mine]]))
        gates = part if config.rankwise_gates else slice(head, head + 1)
        _set(module, "beta_proj", gates, weight.expand(gates.stop - gates.start, dim))
        _set(module, "beta_bias", gates, bias.expand(gates.stop - gates.start))
        _set(module, "delta_o_proj", (slice(None), part), slices[part].T)
        match = (
            (module.unit((x[fold:] @ keys.T)[:, None]) * module.unit((y[fold:] @ queries.T)[:, None])).sum(-1).mean()
        )
        code = codes[found[mine][fold:]] @ slices[part].T
        share = ((x[fold:] @ coded.T) * code).sum() / code.square().sum()
        recalled.append((match * share).clamp_min(0.0))
    return torch.stack(recalled)


@dataclass(frozen=True)
class _Centred:
    """Features without their constant part.

    Attributes:
        pairs: [n, D], with the mean direction projected out.
        direction: [D], unit length: the mean direction. Projections have no bias, so it must not reach them.
    """

    pairs: Tensor
    direction: Tensor

    @classmethod
    def of(cls, pairs: Tensor, all_of_them: Tensor) -> _Centred:
        mean = torch.cat([pairs, all_of_them]).mean(0)
        direction = mean / mean.norm().clamp_min(1e-6)
        return cls(pairs - (pairs @ direction)[:, None] * direction, direction)

    def without(self, features: Tensor) -> Tensor:
        """Other features [n, D] without the same part."""
        return features - (features @ self.direction)[:, None] * self.direction

    def weights(self, weights: Tensor) -> Tensor:
        """Weights [r, D] for features as they are, from weights for those without the constant part."""
        return weights - (weights @ self.direction)[:, None] * self.direction


def _correlated(x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` directions in which x [n, D] and y [n, D] correlate most: weights [rank, D] for each."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    roots = [_inverse_root(z.T @ z / len(z), _KEY_RIDGE) for z in (x, y)]
    u, strength, v = torch.linalg.svd(roots[0] @ (x.T @ y / len(x)) @ roots[1])
    # Directions count as much as they correlate, so that the product of key and query is the likeliest match.
    strength = strength[:rank].sqrt()[:, None]
    mapped = (strength * (u[:, :rank].T @ roots[0]), strength * (v[:rank] @ roots[1]))
    scaled = [w * (_KEY_SCALE / (z @ w.T).std().clamp_min(1e-9)) for w, z in zip(mapped, (x, y), strict=True)]
    return scaled[0].float(), scaled[1].float()


def _inverse_root(covariance: Tensor, ridge: float = _RIDGE) -> Tensor:
    covariance = covariance + ridge * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors @ torch.diag(values.clamp_min(1e-12).rsqrt()) @ vectors.T
    return root


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """Weights [m, D] with x [n, D] @ weights.T close to y [n, m]."""
    x, y = x.double(), y.double()
    covariance = x.T @ x
    covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    weights: Tensor = torch.linalg.solve(covariance, x.T @ y)
    return weights.T.float()


def _gate(values: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [D] and bias of a gate whose mean logit is `_GATE_VALUE` at values and `_GATE_OTHER` elsewhere."""
    x = torch.cat([values, others])
    labels = torch.cat([torch.ones(len(values)), torch.zeros(len(others))])
    # Both kinds count the same, however many there are of each.
    weight = torch.cat([torch.full((len(values),), 0.5 / len(values)), torch.full((len(others),), 0.5 / len(others))])
    mean = (weight[:, None] * x).sum(0)
    root = weight.sqrt()[:, None]
    fit = _ridge(root * (x - mean), (root[:, 0] * (labels - 0.5))[:, None])[0]
    high, low = (values - mean) @ fit, (others - mean) @ fit
    slope = (_GATE_VALUE - _GATE_OTHER) / (high.mean() - low.mean()).clamp_min(1e-6)
    return slope * fit, _GATE_VALUE - slope * (high.mean() + mean @ fit)


def _all_recalls(steered: SteeredModel, examples: Sequence[Example]) -> list[_Recalls]:
    if "o" not in steered.config.delta_heads:
        raise ConfigError(
            f"weights are fitted where the memory corrects o; found delta_heads {steered.config.delta_heads}"
        )
    return [_recalls(example) for example in examples]


def _recalls(example: Example) -> _Recalls:
    """Where an example's questions recall what its passes wrote."""
    pairs = []
    for asked, ask in enumerate(example.asks):
        for start, stop in _full(ask):
            run = ask.ids[start : stop - 1]  # the token after a value has full weight too
            where = _last_place(example.passes, run)
            if where is not None:
                number, at = where
                pairs += [(number, at + n, asked, start + n - 1, n == 0) for n in range(len(run))]
    return _Recalls(example, tuple(pairs))


def _full(ask: Pass) -> Iterator[tuple[int, int]]:
    """Runs of tokens with full weight."""
    start: int | None = None
    for place, weight in enumerate([*ask.weights, 0.0]):
        if weight >= 1.0 and start is None:
            start = place
        elif weight < 1.0 and start is not None:
            if place - start > 1:
                yield start, place
            start = None


def _last_place(passes: Sequence[Pass], run: Sequence[int]) -> tuple[int, int] | None:
    """The pass and position where a run of tokens was written last."""
    for number in reversed(range(len(passes))):
        each = passes[number]
        for at in reversed(range(len(each.ids) - len(run) + 1)):
            if each.ids[at : at + len(run)] == list(run) and min(each.segments[at : at + len(run)]) >= 0:
                return number, at
    return None


def _collect(steered: SteeredModel, recalls: Sequence[_Recalls], pad: int, rows: int) -> tuple[Places, list[_Features]]:
    """The places, and the bare model's hidden states layer by layer."""
    generator = torch.Generator().manual_seed(0)
    wanted: list[tuple[Pass, list[int]]] = []  # a pass, and the positions to keep
    examples, tokens, values, found, first = list[int](), list[int](), list[bool](), list[int](), list[bool]()
    written, replies = list[int](), list[int]()  # which of `wanted` are passes and which are questions
    for number, each in enumerate(recalls):
        recalled = {(place, at) for place, at, *_ in each.pairs}
        index: dict[tuple[int, int], int] = {}
        for place, read in enumerate(each.example.passes):
            drawn = torch.randperm(len(read.ids), generator=generator)[:_OTHERS].tolist()
            kept = sorted({at for at in drawn if read.segments[at] >= 0} | {at for p, at in recalled if p == place})
            for at in kept:
                index[place, at] = len(tokens)
                examples.append(number)
                tokens.append(read.ids[at])
                values.append((place, at) in recalled)
            written.append(len(wanted))
            wanted.append((read, kept))
        for question, read in enumerate(each.example.asks):
            pairs = [pair for pair in each.pairs if pair[2] == question]
            found += [index[place, at] for place, at, *_ in pairs]
            first += [pair[4] for pair in pairs]
            replies.append(len(wanted))
            wanted.append((read, [pair[3] for pair in pairs]))
    hidden = _hidden(steered, wanted, pad, rows)
    places = Places(*(torch.tensor(each) for each in (examples, tokens, values, found, first)))
    features = [
        _Features(torch.cat([layer[n] for n in written]), torch.cat([layer[n] for n in replies])) for layer in hidden
    ]
    return places, features


def _random_tokens(steered: SteeredModel, pad: int, rows: int) -> tuple[Tensor, list[Tensor]]:
    """Tokens of random rows, [n], and their hidden states layer by layer, [n, D] each."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = steered.model.get_output_embeddings().weight.shape[0]
    drawn = torch.randint(vocabulary, (_RANDOM_ROWS, _RANDOM_LENGTH), generator=generator)
    passes = [(Pass(row, [], [], len(row)), list(range(_SKIPPED, len(row)))) for row in drawn.tolist()]
    return drawn[:, _SKIPPED:].flatten(), [torch.cat(layer) for layer in _hidden(steered, passes, pad, rows)]


def _hidden(steered: SteeredModel, wanted: Sequence[tuple[Pass, list[int]]], pad: int, rows: int) -> list[list[Tensor]]:
    """For each layer with memory, the inputs of its attention at the wanted positions of every pass, [n, D] each."""
    hidden: list[list[Tensor]] = [[torch.empty(0)] * len(wanted) for _ in steered.layers]
    for number, inputs in hidden_states(steered, [each.ids for each, _ in wanted], pad, at_once=rows):
        for layer, states in enumerate(inputs):
            hidden[layer][number] = states[wanted[number][1]]
    return hidden


def _residual_scale(steered: SteeredModel, recalls: Sequence[_Recalls], pad: int, rows: int) -> float:
    """Root mean square of what enters the last norm, at some of the tokens that predict a recalled value."""
    if _final_norm_module(steered) is None:
        return 1.0
    pairs = [(each.example.asks[asked].ids, before) for each in recalls for _, _, asked, before, _ in each.pairs]
    pairs = pairs[:_MEASURED]
    states = hidden_states(steered, [ids for ids, _ in pairs], pad, last=True, at_once=rows)
    kept = [layers[-1, pairs[number][1]].float() for number, layers in states]
    return float(torch.stack(kept).square().mean().sqrt())


def _final_norm_module(steered: SteeredModel) -> torch.nn.Module | None:
    norm = getattr(steered.model.get_decoder(), "norm", None)
    return norm if isinstance(norm, torch.nn.Module) else None


def _final_norm(steered: SteeredModel) -> Tensor | None:
    weight = getattr(_final_norm_module(steered), "weight", None)
    return weight.detach().float() if isinstance(weight, Tensor) else None


def _modules(steered: SteeredModel) -> list[LayerMemory]:
    return [module for module in steered.memory if isinstance(module, LayerMemory)]


def _set(module: LayerMemory, name: str, part: slice | tuple[slice, slice], values: Tensor) -> None:
    parameter = module.get_parameter(name)
    parameter[part] = values.to(parameter)
