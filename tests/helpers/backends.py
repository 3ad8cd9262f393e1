"""What tests need that run on every backend, also in Triton's interpreter and on a GPU (`kernels/test_backends.py`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device(os.environ.get("AGENTMEM_KERNELS_ON", "cpu"))

if INTERPRETED:
    from triton.runtime import interpreter

    prepared: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function that a kernel calls. The interpreter prepares triton.language anew for every call of one (tl.sum
        is one), which takes most of its time; once for each module is enough, and the launch has seen to the rest."""
        if self.fn.__module__ not in prepared:
            prepared.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


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
