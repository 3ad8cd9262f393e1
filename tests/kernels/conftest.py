"""The tests of this folder run on whichever backend the process has.

In an ordinary run that is plain torch. ``test_backends.py`` runs the same files again in processes of their own: in
Triton's interpreter, which has to be on before anything imports triton and would stay on for whatever runs after it,
and on a CUDA device. ``AGENTMEM_KERNELS_ON`` names the device there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

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


@pytest.fixture
def device() -> torch.device:
    return torch.device(os.environ.get("AGENTMEM_KERNELS_ON", "cpu"))


@pytest.fixture
def seed() -> int:
    """Another one every time; pytest shows it where the test fails, AGENTMEM_SEED repeats it."""
    number = int(os.environ.get("AGENTMEM_SEED") or random.SystemRandom().randrange(2**31))
    print(f"AGENTMEM_SEED={number}")
    return number


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel leaves unwritten or reads too early is seen."""
    torch.set_deterministic_debug_mode("warn")
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.set_deterministic_debug_mode("default")
