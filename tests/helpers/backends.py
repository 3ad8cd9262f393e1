"""What tests need that run on every backend, also in Triton's interpreter and on a GPU (`kernels/test_backends.py`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.helpers.interpreter import quicken

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device(os.environ.get("AGENTMEM_KERNELS_ON", "cpu"))

if INTERPRETED:
    quicken()


def slow_interpreted(test: Any) -> Any:
    """Triton's interpreter runs programs one after another: a few cases have to do in an ordinary run."""
    return pytest.mark.slow(test) if INTERPRETED else test


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel leaves unwritten or reads too early is seen."""
    torch.set_deterministic_debug_mode("warn")
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.set_deterministic_debug_mode("default")
