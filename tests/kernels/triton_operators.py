"""What torch is told about the scan, whose operators run Triton alone; run by `test_backends.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agentmem import kernels
from agentmem.kernels import ScanArgs
from tests.helpers.kernel_cases import moved, scan_inputs
from tests.helpers.numeric import assert_close
from tests.kernels.test_operators import CHECKS, compiled


@pytest.fixture(autouse=True)
def on_triton(device: torch.device) -> None:
    assert kernels.runs_triton(device)


def test_scan_is_as_it_was_declared(device: torch.device) -> None:
    leaves = [x.requires_grad_() for x in moved(device, *scan_inputs(3, 2, 7, 1, 4, "smooth"))]
    torch.library.opcheck(torch.ops.agentmem.scan.default, (*leaves, 4), test_utils=CHECKS)


def test_a_scan_is_a_node_of_a_graph_and_gradients_pass(device: torch.device) -> None:
    def scanned(*args: Tensor) -> Tensor:
        y, last = kernels.scan(ScanArgs(*args), chunk=4)
        return (y.sin().sum() + last.cos().sum())[None]

    traced, graphs = compiled(scanned)
    for seed in (9, 10):
        args = moved(device, *scan_inputs(seed, 1, 9, 1, 4, "smooth"))
        found, expected = (
            torch.autograd.grad(form(*leaves).sum(), leaves)
            for form, leaves in ((form, [x.clone().requires_grad_() for x in args]) for form in (traced, scanned))
        )
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, 2 * (9 + 3 * 4))
    assert graphs == [1]


def test_what_a_scan_returns_is_new_memory(device: torch.device) -> None:
    args = ScanArgs(*moved(device, *scan_inputs(0, 2, 0, 1, 4, "smooth")))
    _, last = kernels.scan(args)
    assert last.data_ptr() != args.state.data_ptr()
