"""The tests of this folder run on whichever backend the process has.

In an ordinary run that is plain torch. `test_backends.py` runs the same files again in processes of their own: in
Triton's interpreter, which has to be on before anything imports triton and would stay on for whatever runs after it,
and on a CUDA device. `AGENTMEM_KERNELS_ON` names the device there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

from tests.helpers.backends import DEVICE, poisoned_memory


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def seed() -> int:
    """Another one every time; pytest shows it where the test fails, AGENTMEM_SEED repeats it."""
    number = int(os.environ.get("AGENTMEM_SEED") or random.SystemRandom().randrange(2**31))
    print(f"AGENTMEM_SEED={number}")
    return number


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield
