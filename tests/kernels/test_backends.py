"""These tests, and the mechanism, on the other backends: each in a process of its own (`conftest` says why)."""

from __future__ import annotations

import json
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


@pytest.mark.timeout(900)  # a minute where nothing else runs
def test_triton_in_the_interpreter() -> None:
    run(*KERNELS, MECHANISM, f"{EQUIVALENCE}[triton-sentence-1-sdpa-dynamic]", TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_shapes_in_the_interpreter() -> None:
    equivalence = [f"{EQUIVALENCE}[triton-{name}-sdpa-static]" for name in ("token-4", "message-1")]
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


# In a process of its own: whether functions are compiled or interpreted is settled when triton is imported.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from agentmem.kernels import triton_scan, triton_step

capability, rank, thorough = map(int, sys.argv[1:])
types = {"slots": "*i64", "mask": "*u8"}
types |= dict.fromkeys(("layer", "layers", "stride", "length", "chunks"), "i32")
shape = triton_scan.Shape(batch=2, heads=2, rank=rank, length=300, chunk=64)


def made(function, warps, **constants):
    names = {p.name: constants[p.name] if p.is_constexpr else None for p in function.params}
    signature = {n: types.get(n, "*fp32") if v is None else "constexpr" for n, v in names.items()}
    source = ASTSource(function, signature, {(i,): v for i, v in enumerate(names.values()) if v is not None})
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    print(json.dumps([function.__name__, len(built.asm["cubin"]), "cp.async" in built.asm["ptx"]]))


for mode in range(3) if thorough else (1,):
    step = dict(HEADS=2, RANK=rank, R=shape.padded, ROWWISE=mode != 1, NORMALIZE=mode != 2, COUPLED=mode == 0)
    made(triton_step._step, 1 if shape.padded <= 16 else 4, **step, MODE=mode, MASKED=mode != 0)
for on in (True, False) if thorough else (True,):
    rows, _, constants = shape.kernel(256, 3)
    warps = constants.pop("num_warps")
    made(triton_scan._compose, warps, **constants, ROWS=rows, CHUNK=64, REVERSE=on)
    made(triton_scan._boundary, warps, **constants, ROWS=rows, REVERSE=on)
    rows, _, constants = shape.kernel(1024, 2)
    warps = constants.pop("num_warps")
    made(triton_scan._outputs, warps, **constants, ROWS=rows, CHUNK=64, READS=on, FINE=0 if on else 8)
_, _, constants = shape.kernel(shape.padded**2, 2)
warps = constants.pop("num_warps")
made(triton_scan._gradients, warps, **constants, CHUNK=64, FINE=8)
"""


@pytest.mark.parametrize(
    ("capability", "rank", "thorough"),
    [
        (90, 8, False),
        *(
            pytest.param(*one, True, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
            for one in [(80, 8), (89, 5), (90, 64), (100, 32), (120, 16)]
        ),
    ],
)
def test_every_kernel_compiles(
    capability: int, rank: int, thorough: bool, needs: Callable[[object, str], None], tmp_path: Path
) -> None:
    needs(find_spec("triton"), "triton, which is part of the dependency group `dev`")
    command = [sys.executable, "-c", COMPILE, str(capability), str(rank), str(int(thorough))]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name for name, _, _ in built} == {"_step", "_compose", "_boundary", "_outputs", "_gradients"}
    assert all(size > 0 for _, size, _ in built)
    # Loops over tokens and chunks ask for what comes next before they compute.
    assert {name for name, _, ahead in built if ahead} == {"_compose", "_boundary", "_outputs"}
