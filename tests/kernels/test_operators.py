"""What torch is told about the operations: schemas and shapes, and one graph whatever the sessions."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agentmem import kernels
from tests.helpers.numeric import assert_close
from tests.kernels.test_step import arguments

# What tracing makes of them is seen below, in graphs.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def compiled(module: Any) -> tuple[Any, list[int]]:
    """The module as one graph, and how many of the operators every graph that was made of it holds."""
    graphs: list[int] = []
    # Traces gradients and in-place writes as inductor's front does, and then runs them as they are.
    trace = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(sum("agentmem" in str(node.target) for node in graph.graph.nodes))
        return trace(graph, inputs)

    torch.compiler.reset()
    return torch.compile(module, fullgraph=True, backend=backend), graphs


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("masked", [True, False])
def test_step_is_as_it_was_declared(device: str, masked: bool) -> None:
    given = arguments(3, 2, 2, 4, coupled=masked)
    given["mask"] = torch.tensor([True, False]) if masked else None
    placed = [x.to(device) if isinstance(x, Tensor) else x for x in given.values()]
    torch.library.opcheck(torch.ops.agentmem.step.default, tuple(placed), test_utils=CHECKS)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_project_is_as_it_was_declared(device: str, dtype: torch.dtype) -> None:
    parts = [torch.randn(rows, 5, device=device, dtype=dtype) for rows in (4, 4, 1)]
    torch.library.opcheck(
        torch.ops.agentmem.project.default, (torch.randn(2, 5, device=device), parts), test_utils=CHECKS
    )


@pytest.mark.parametrize("packed", ["packed", "apart", "swapped", "cut"])
def test_project_is_one_product_wherever_the_weights_lie(packed: str) -> None:
    torch.manual_seed(4)
    whole, hidden = torch.randn(9, 5), torch.randn(3, 5)
    parts = list(whole.split([4, 4, 1]))
    if packed == "swapped":
        parts = [parts[1], parts[0], parts[2]]
    elif packed == "apart":
        parts = [part.clone() for part in parts]
    elif packed == "cut":
        parts, hidden = [part[:, :3] for part in parts], hidden[:, :3]
    expected = torch.cat([hidden @ part.T for part in parts], dim=1)
    assert_close(kernels.project(hidden, parts), expected, 5)


def test_project_copies_no_weights_that_are_packed() -> None:
    parts = list(torch.randn(9000, 5).split([4000, 4000, 1000]))
    hidden = torch.randn(1, 5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        kernels.project(hidden, parts)
    assert "aten::cat" not in {one.key for one in found.key_averages()}


def test_kernels_run_where_they_can_and_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("AGENTMEM_TRITON", raising=False)
    assert not kernels.runs_triton(torch.device("cuda"))
    monkeypatch.setenv("AGENTMEM_TRITON", "1")
    assert kernels.runs_triton(torch.device("cuda")) == bool(find_spec("triton"))
    assert not kernels.runs_triton(torch.device("cpu"))


class Layers(nn.Module):
    """Two layers that steer what they are given by a pool of states, as decoding does."""

    def __init__(self, heads: int = 2, rank: int = 4, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(5)
        size = heads * rank
        self.project = nn.ModuleList(nn.Linear(width, 4 * size) for _ in range(2))
        self.correct = nn.ModuleList(nn.Linear(size, width) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(size))
        self.register_buffer("pool", torch.randn(6, 2, heads, rank, rank))

    def forward(self, hidden: Tensor, slots: Tensor) -> Tensor:
        assert isinstance(self.pool, Tensor)
        for layer, (project, correct) in enumerate(zip(self.project, self.correct, strict=True)):
            read = kernels.step(kernels.StepArgs(project(hidden), self.pool, slots, layer, self.bias))
            hidden = hidden + correct(read)
        return hidden


@pytest.mark.parametrize("device", ["cpu", CUDA])
@torch.no_grad()
def test_other_sessions_are_no_other_graph(device: str) -> None:
    eager, traced = Layers().to(device), Layers().to(device)
    step, graphs = compiled(traced)
    for slots in ([0, 1], [4, 2], [-1, 5], [-1, -1], [3, 0]):
        hidden = torch.randn(2, 16, device=device)
        at = torch.tensor(slots, device=device)
        # Two layers of products of 16 and 8 numbers, and reads of 4.
        assert_close(step(hidden, at), eager(hidden, at), 2 * (16 + 8 + 4))
        assert_close(traced.pool, eager.pool, 2 * (16 + 8 + 4))
    assert graphs == [2], "one graph that holds both layers' steps"
