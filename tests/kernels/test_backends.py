"""These tests, and the mechanism, on the other backends: each in a process of its own (`conftest` says why)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = [str(HERE / name) for name in ("test_step.py", "test_scan.py", "triton_operators.py")]
# What the engine computes with them.
MECHANISM = str(HERE.parent / "core" / "test_mechanism.py")
EQUIVALENCE = str(HERE.parent / "core" / "test_equivalence.py") + "::test_cut_padded_batched_or_alone"


def run(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    done = subprocess.run(
        command, cwd=HERE.parents[1], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True)
def triton(needs: Callable[[object, str], None]) -> None:
    needs(find_spec("triton"), "triton, which is part of the dependency group `dev`")


def test_triton_in_the_interpreter() -> None:
    equivalence = f"{EQUIVALENCE}[triton-sentence-1-coupled-sdpa-dynamic]"
    run(*KERNELS, MECHANISM, equivalence, TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_shapes_in_the_interpreter() -> None:
    equivalence = [f"{EQUIVALENCE}[triton-{name}-4-uncoupled-sdpa-static]" for name in ("token", "message")]
    run("-m", "slow", *KERNELS, MECHANISM, TRITON_INTERPRET="1")
    run(*equivalence, TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_triton_on_a_gpu() -> None:
    run(*KERNELS, MECHANISM, EQUIVALENCE, AGENTMEM_KERNELS_ON="cuda", AGENTMEM_TRITON="1")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_shapes_on_a_gpu() -> None:
    run("-m", "slow", *KERNELS, MECHANISM, AGENTMEM_KERNELS_ON="cuda", AGENTMEM_TRITON="1")
