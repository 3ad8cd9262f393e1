"""MemoryChannel and the merge of parallel branches."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pytest
from langgraph.errors import EmptyChannelError, InvalidUpdateError
from langgraph.graph import StateGraph
from langgraph.types import Overwrite
from typing_extensions import TypedDict

from agentmem import MemoryState, Message
from agentmem.errors import ConfigError, CorruptStateError, StateMismatchError
from agentmem_langgraph import MemoryChannel, merge_states

SHAPE = [2, 3, 4, 4]


def state(seed: int, base: MemoryState | None = None, says: str = "", **fingerprints: str) -> MemoryState:
    """Random matrices; consumed: what the base has, and a message."""
    start = base or MemoryState.zeros(SHAPE, "model", "adapter")
    numbers = np.random.default_rng(seed).normal(size=SHAPE)
    made = start.replaced(matrices=numbers, record=start.record.extend([Message("user", says or f"message {seed}")]))
    return MemoryState.from_matrices(
        made.matrices,
        made.record,
        model_fingerprint=fingerprints.get("model", "model"),
        adapter_fingerprint=fingerprints.get("adapter", "adapter"),
    )


def by_the_formula(base: MemoryState, branches: list[MemoryState]) -> np.ndarray[Any, Any]:
    """DESIGN section 4, row by row, in plain Python numbers."""
    merged = np.zeros(SHAPE)
    for place in np.ndindex(*SHAPE[:3]):
        row = [float(x) for x in base.matrices[place]]
        energy = sum(x * x for x in row)
        least, total = 1.0, [0.0] * len(row)
        for branch in branches:
            other = [float(x) for x in branch.matrices[place]]
            d = sum(a * b for a, b in zip(other, row, strict=True)) / energy if energy else 1.0
            d = min(max(d, 0.0), 1.0)
            least = min(least, d)
            total = [t + a - d * b for t, a, b in zip(total, other, row, strict=True)]
        merged[place] = [least * b + t for b, t in zip(row, total, strict=True)]
    return merged


def channel(value: MemoryState | None = None) -> MemoryChannel:
    made = MemoryChannel(MemoryState, "memory")
    if value is not None:
        made.update([value])
    return made


def test_it_starts_empty() -> None:
    empty = channel()
    assert not empty.is_available()
    with pytest.raises(EmptyChannelError):
        empty.get()
    assert not MemoryChannel(MemoryState).from_checkpoint(empty.checkpoint()).is_available()
    assert not empty.update([])


@pytest.mark.parametrize("form", [lambda s: s, MemoryState.to_dict], ids=["value", "dict"])
def test_it_takes_both_forms_and_gives_the_value(form: Any) -> None:
    written = channel()
    assert written.update([form(state(1))])
    assert written.get() == state(1)
    assert written.checkpoint() == state(1).to_dict()
    assert written.from_checkpoint(written.checkpoint()).get() == state(1)
    assert written.copy().get() == state(1)


def test_it_verifies_what_comes_in() -> None:
    broken = state(1).to_dict() | {"count": 9}
    with pytest.raises(CorruptStateError):
        channel().update([broken])
    with pytest.raises(CorruptStateError):
        channel().from_checkpoint(broken)


def test_none_empties_and_overwrite_replaces() -> None:
    held = channel(state(1))
    assert held.update([state(2, state(1)), Overwrite(state(3, model="other")), state(4, state(1))])
    assert held.get() == state(3, model="other")
    assert held.update([None])
    assert not held.is_available()
    held.update([Overwrite(state(5).to_dict())])
    assert held.get() == state(5)
    assert held.update([Overwrite(None)])
    assert not held.is_available()


@pytest.mark.parametrize("form", [lambda x: {"__overwrite__": x}, lambda x: {"value": x, "type": "__overwrite__"}])
def test_an_overwrite_that_went_through_json_replaces(form: Callable[[Any], dict[str, Any]]) -> None:
    """As LangGraph's own channels take it from clients of its server."""
    held = channel(state(1))
    assert held.update([state(2, state(1)), json.loads(json.dumps(form(state(3, model="other").to_json())))])
    assert held.get() == state(3, model="other")
    with pytest.raises(InvalidUpdateError, match="one write"):
        held.update([None, form(state(4).to_dict())])
    assert held.update([form(None)])
    assert not held.is_available()


def test_two_replacements_in_a_step_are_refused() -> None:
    with pytest.raises(InvalidUpdateError, match="one write"):
        channel(state(1)).update([None, Overwrite(state(2))])


@pytest.mark.parametrize("which", ["model", "adapter"])
def test_another_models_memory_is_refused(which: str) -> None:
    held = channel(state(1))
    with pytest.raises(StateMismatchError, match=which):
        held.update([state(2, **{which: "other"})])
    with pytest.raises(StateMismatchError, match=which):
        channel().update([state(1), state(2, **{which: "other"})])
    assert held.get() == state(1)


def test_one_writer_may_go_back_and_an_unchanged_memory_is_no_update() -> None:
    held = channel(state(1))
    assert not held.update([state(1)])
    assert not held.update([state(1), state(1).to_dict()])
    assert held.update([state(2)])
    assert held.get() == state(2)


def test_a_graph_describes_its_memory() -> None:
    class State(TypedDict):
        memory: Annotated[MemoryState, MemoryChannel]

    class Other(TypedDict):
        memory: Annotated[MemoryState, MemoryChannel]

    builder = StateGraph(State, input_schema=Other)
    builder.add_node("same", lambda state: {})
    builder.set_entry_point("same")
    graph = builder.compile()
    assert isinstance(graph.channels["memory"], MemoryChannel)
    assert "memory" in graph.get_input_jsonschema()["properties"]


@pytest.mark.parametrize("base", [state(1), MemoryState.zeros(SHAPE, "model", "adapter")], ids=["base", "zeros"])
@pytest.mark.parametrize("branches", [2, 3, 5])
def test_branches_merge_by_the_formula(branches: int, base: MemoryState) -> None:
    writes = [state(10 + n, base) for n in range(branches)]
    held = channel(base if base.count else None)  # an empty one merges from zeros
    held.update(writes)
    assert held.get() == merge_states(base, writes)
    np.testing.assert_allclose(held.get().matrices, by_the_formula(base, writes), rtol=0, atol=2e-6)


def test_what_all_branches_kept_of_the_base_is_there_once() -> None:
    # Branches write to different rows and leave the others alone: nothing of the base may decay or double.
    base = state(1)
    writes = []
    for n in range(3):
        matrices = base.matrices.copy()
        matrices[:, :, n] = 7.0 + n
        writes.append(state(10 + n, base).replaced(matrices=matrices))
    merged = merge_states(base, writes).matrices
    np.testing.assert_array_equal(merged[:, :, 3], base.matrices[:, :, 3])


def test_one_changed_branch_is_the_result_bit_for_bit() -> None:
    base = state(1)
    changed = state(2, base)
    held = channel(base)
    held.update([base, changed, base.to_dict()])
    assert held.get() == changed


@pytest.mark.parametrize("form", [MemoryState.to_dict, MemoryState.to_json])
def test_branches_come_in_every_form_of_a_memory(form: Callable[[MemoryState], Any]) -> None:
    base = state(1)
    ends = [state(2, base, "a"), state(3, base, "b")]
    assert merge_states(form(base), [form(end) for end in ends]) == merge_states(base, ends)
    for wrong in (None, "memory", 3, [base], form(base) | {"count": 9}):
        with pytest.raises(CorruptStateError):
            merge_states(wrong, ends)  # type: ignore[arg-type]
        with pytest.raises(CorruptStateError):
            merge_states(base, [*ends, wrong])
    for single in (base, form(base)):
        with pytest.raises(ConfigError, match=r"pass \[memory\]"):
            merge_states(base, single)


def test_the_record_is_the_bases_and_each_branchs_in_task_order() -> None:
    base = state(1)
    held = channel(base)
    held.update([state(2, base, "b"), state(3, base, "a")])
    assert held.get().record == base.record.extend([Message("user", "b"), Message("user", "a")])


def test_a_branch_from_another_base_is_refused() -> None:
    held = channel(state(1))
    with pytest.raises(StateMismatchError, match="same base"):
        held.update([state(2, state(1)), state(3, state(9))])
    assert held.get() == state(1)
