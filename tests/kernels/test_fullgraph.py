"""A steered model decodes as one graph: `SteeredModel.step` compiled, on a pool of states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from agentmem import SteeredModel
from agentmem.errors import SegmentsRequiredError, StateMismatchError, TurnError
from agentmem.generation.batch_cache import BatchedKVCache
from tests.helpers.core_models import TERMS, random_ids, random_state, steer, tiny
from tests.helpers.numeric import assert_close

PROMPT, ROOM, LAYERS = 6, 16, 2
# Of a pool of five; rows 0 and 1 begin in slots 1 and 3.
SLOTS = ([1, 3], [3, 1], [0, -1], [4, 2], [2, 3], [-1, -1])


class Decoding(NamedTuple):
    """Two rows that have read a prompt."""

    cache: Any
    pool: Tensor

    def copy(self, steered: SteeredModel) -> Decoding:
        """As it was begun, with the states that it has."""
        return begun(steered)._replace(pool=self.pool.clone())


def begun(steered: SteeredModel) -> Decoding:
    cache = StaticCache(config=steered.model.config, max_cache_len=ROOM)
    pool = random_state(steered, 5)
    reads = steered.config.write_strategy == "token"
    out = steered(random_ids(2, PROMPT), pool[[1, 3]], write=reads, cache=cache, logits_to_keep=-1)
    pool[[1, 3]] = out.state
    return Decoding(cache, pool)


def given(number: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Tokens, slots and what else changes from token to token."""
    places = torch.full((2, 1), PROMPT + number)
    write = torch.tensor([[number % 3 != 1], [True]])
    return random_ids(2, 1, seed=90 + number), torch.tensor(SLOTS[number]), {"position_ids": places, "write": write}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Whatever would be compiled twice is an error."""
    torch.compiler.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("qwen3", num_hidden_layers=LAYERS)


def traced(steered: SteeredModel, backend: str) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)  # type: ignore[no-untyped-call]
    return torch.compile(steered.step, fullgraph=True, backend=counter), counter


def close(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, TERMS)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("aot_eager", {}),
        (
            "eager",
            {
                "num_state_heads": 2,
                "couple_lambda": False,
                "delta_heads": ("q", "k", "v", "o"),
                "trainable_delta_scale": True,
                "delta_o_rmsnorm": True,
            },
        ),
    ],
)
def test_one_graph_whoever_decodes(backend: str, options: dict[str, Any], model: Any) -> None:
    steered = steer(model, rank=4, **options)
    plain = begun(steered)
    graph = plain.copy(steered)
    step, counter = traced(steered, backend)
    for number, row in enumerate(SLOTS):
        ids, slots, more = given(number)
        if number == 3:  # a session arrives
            plain.pool[4] = graph.pool[4] = random_state(steered, seed=41)[0]
        if number == 4:  # weights are learned, and loaded: the graph keeps nothing of them
            for module in steered.memory:
                module.memory_q_proj.data = module.memory_q_proj.flip(0)
                if steered.config.trainable_delta_scale:
                    module.delta_scale_raw.add_(1.0)
        before = graph.pool.clone()
        expected = steered.step(ids, plain.pool, slots, cache=plain.cache, **more)
        close(step(ids, graph.pool, slots, cache=graph.cache, **more), expected)
        close(graph.pool, plain.pool)
        writing = {slot for slot, on in zip(row, more["write"].flatten().tolist(), strict=True) if on}
        for slot in range(5):
            changed = not torch.equal(graph.pool[slot], before[slot])
            assert changed == (slot in writing), "inert rows, and rows that do not write, leave every state alone"
    # Another pool of other sessions is another value, too.
    ids, slots, more = given(0)
    more["position_ids"] += len(SLOTS)
    pools = [random_state(steered, 5, seed=8) for _ in range(2)]
    close(
        step(ids, pools[0], slots, cache=graph.cache, **more),
        steered.step(ids, pools[1], slots, cache=plain.cache, **more),
    )
    close(*pools)
    assert counter.frame_count == 1
    nodes = [str(node.target) for node in counter.graphs[0].graph.nodes]
    for own in ("agentmem.project", "agentmem.step"):
        assert sum(own in node for node in nodes) == LAYERS
    steered.detach()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "smollm3", "phi3", "olmo2", "granite"])
def test_one_graph_of_other_models(architecture: str) -> None:
    """Phi3 has one product for q, k and v. Those with sliding windows are not here: their cache counts in Python."""
    steered = steer(tiny(architecture))
    plain = begun(steered)
    graph = plain.copy(steered)
    step, counter = traced(steered, "eager")
    for number in range(len(SLOTS)):
        ids, slots, more = given(number)
        expected = steered.step(ids, plain.pool, slots, cache=plain.cache, **more)
        close(step(ids, graph.pool, slots, cache=graph.cache, **more), expected)
        close(graph.pool, plain.pool)
    assert counter.frame_count == 1


def test_a_step_is_a_call_of_one_token(model: Any) -> None:
    steered = steer(model)
    decoding = begun(steered)
    state, other = decoding.pool[[3, 1]].clone(), decoding.copy(steered)
    ids, _, more = given(0)
    logits = steered.step(ids, decoding.pool, torch.tensor([3, 1], dtype=torch.int32), cache=decoding.cache, **more)
    out = steered(ids, state, cache=other.cache, **more)
    assert out.logits is not None
    close(logits, out.logits[:, -1])
    close(decoding.pool[[3, 1]], out.state)
    steered.detach()


def test_an_inert_row_is_not_steered(model: Any) -> None:
    steered = steer(model)
    decoding = begun(steered)
    bare, pool = decoding.copy(steered).cache, decoding.pool.clone()
    ids, _, more = given(0)
    logits = steered.step(ids, decoding.pool, torch.tensor([-1, 1]), cache=decoding.cache, **more)
    assert torch.equal(decoding.pool[[0, 2, 3, 4]], pool[[0, 2, 3, 4]])
    steered.detach()
    expected = model(input_ids=ids, cache=bare, position_ids=more["position_ids"]).logits[:, -1]
    close(logits[0], expected[0])
    assert (logits[1] - expected[1]).abs().max() > 1e-3


def test_rows_of_different_lengths_in_a_batched_cache(model: Any) -> None:
    """As the engine decodes them together, and through a mask: each row has a position of its own."""
    steered = steer(model, rank=4)
    starts = random_state(steered, 3)
    alone = [steered(random_ids(1, 3 + row, seed=row), starts[row : row + 1], cache=True) for row in range(3)]
    batch = BatchedKVCache(alone[0].cache, ROOM)
    for row, out in enumerate(alone):
        batch.add_row(out.cache, 3 + row)
    pool = torch.cat([*(out.state for out in alone), steered.zeros()])
    step, counter = traced(steered, "eager")
    # It has room for a power of two; the last row is free.
    slots = torch.tensor([2, 0, 1, -1])
    pool[[2, 0, 1]] = pool[:3].clone()
    for number in range(3):
        ids = random_ids(4, 1, seed=70 + number)
        places = torch.tensor([[3 + number], [4 + number], [5 + number], [0]])
        cache, allowed = batch.over(places, ROOM)
        found = step(ids, pool, slots, position_ids=places, cache=cache, attention_bias=allowed)
        for row in range(3):
            alone[row] = steered(ids[row : row + 1], alone[row].state, cache=alone[row].cache)
            expected = alone[row].logits
            assert expected is not None
            close(found[row], expected[0, -1])
            close(pool[slots[row]], alone[row].state[0])
    assert counter.frame_count == 1
    assert not pool[3].any()
    steered.detach()


class Counting(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_layer_has_at_most_four_operators_more(model: Any) -> None:
    """The product with the hidden state, the step, and a product for each of q and o."""
    steered = steer(model, num_state_heads=2)
    decoding = begun(steered)
    bare = decoding.copy(steered).cache
    ids, slots, more = given(0)
    with Counting() as counting:
        steered.step(ids, decoding.pool, slots, cache=decoding.cache, **more)
    steered.detach()
    with Counting() as alone:
        model(input_ids=ids, cache=bare, position_ids=more["position_ids"], logits_to_keep=1)
    assert counting.count - alone.count == 4 * LAYERS


@pytest.mark.parametrize("strategy", ["message", "sentence"])
def test_adapters_that_write_by_segment_only_read(strategy: str, model: Any) -> None:
    steered = steer(model, write_strategy=strategy)
    decoding = begun(steered)
    before, other = decoding.pool.clone(), decoding.copy(steered)
    ids, slots, more = given(0)
    with pytest.raises(SegmentsRequiredError, match=f"writes by {strategy}"):
        steered.step(ids, decoding.pool, slots, cache=decoding.cache, **more)
    more["write"] = False  # type: ignore[assignment]
    logits = steered.step(ids, decoding.pool, slots, cache=decoding.cache, **more)
    out = steered(ids, before[slots], cache=other.cache, **more)  # type: ignore[arg-type]
    assert out.logits is not None
    close(logits, out.logits[:, -1])
    assert torch.equal(decoding.pool, before)
    steered.detach()


def test_what_does_not_fit_is_refused_before_anything_runs(model: Any) -> None:
    steered = steer(model)
    cache, pool = begun(steered)
    ids, slots, more = given(0)
    good = {"input_ids": ids, "pool": pool, "slots": slots, "cache": cache, **more}
    for changes, error, said in (
        ({"pool": pool[:, 1:]}, StateMismatchError, r"a pool must be float32 \[slots, 2, 1, 8, 8\]"),
        ({"pool": pool.double()}, StateMismatchError, "found torch.float64"),
        ({"pool": pool.mT}, StateMismatchError, "contiguous"),
        ({"pool": pool.to("meta")}, StateMismatchError, "on cpu; found .* on meta"),
        ({"slots": slots[None]}, TurnError, r"slots must be \[B\] int32 or int64"),
        ({"slots": slots.float()}, TurnError, "found torch.float32"),
        ({"input_ids": ids.repeat(1, 2)}, TurnError, r"input_ids must have shape \[2, 1\]"),
        ({"position_ids": ids[:1]}, TurnError, r"position_ids must have shape \[2, 1\]"),
        ({"write": torch.ones(2, dtype=torch.bool)}, TurnError, r"write must be \[2, 1\] bool"),
        ({"attention_bias": torch.ones(2, 8)}, TurnError, r"attention_bias must have shape \[2, 1, 1, 8\]"),
    ):
        before = pool.clone()
        with pytest.raises(error, match=said):
            steered.step(**{**good, **changes})
        assert torch.equal(pool, before)
        assert int(cache.get_seq_length()) == PROMPT
    steered.step(**good)
    steered.detach()
    with pytest.raises(TurnError, match="detached"):
        steered.step(**good)
