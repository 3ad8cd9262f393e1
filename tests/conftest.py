"""Ground rules of all tests: offline, one thread, reproducible, and nothing skipped that CI should have.

- A missing service or extra is met with `needs`: it skips with the reason on your machine and fails where
  CI=true, so that CI cannot turn green by skipping. Only a missing GPU skips everywhere, and slow tests of what is in
  groups of its own (agent-server, ray, deepspeed).
- torch is not imported here: a test that checks what is imported without it must be able to.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import count
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.helpers.processes import Process

# Sums keep their order with one thread. `make test-numeric` runs the numeric tests with others.
THREADS = int(os.environ.get("AGENTMEM_TEST_THREADS", "1"))

# Set before torch or a hub client is imported, and inherited by the processes that tests start.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ANONYMIZED_TELEMETRY": "False",
        "LANGSMITH_TRACING": "false",
        "OMP_NUM_THREADS": str(THREADS),
    }
)

# A second or two of every process that decodes; tests of what it computes turn it on.
os.environ.setdefault("AGENTMEM_NUMBA", "0")

# No deadline: how long an example takes says more about the machine than about the code.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)

IN_CI = os.environ.get("CI", "").lower() == "true"
settings.load_profile("ci" if IN_CI else "local")

Needs = Callable[[object, str], None]


def _needs(present: object, reason: str) -> None:
    if present:
        return
    if IN_CI:
        pytest.fail(f"CI must provide what this test needs: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def needs() -> Needs:
    """`needs(present, reason)`: go on where `present` is true, else skip, or fail where CI=true."""
    return _needs


# The interpreter of Triton has to be on before triton is imported, and a GPU is asked for: `kernels/test_backends.py`
# starts processes of their own for both, in which this is the only backend.
ON_TRITON = os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("AGENTMEM_TRITON") == "1"
BACKENDS = ["triton"] if ON_TRITON else ["torch", "numba"]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, needs: Needs) -> Iterator[str]:
    """What the memory is computed with: torch's operations, calls that numba compiled, or Triton's kernels."""
    name: str = request.param
    if name == "numba":
        needs(find_spec("numba"), "numba, which is part of the dependency group `dev`")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTMEM_NUMBA", "1" if name == "numba" else "0")
        yield name


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Process]:
    """`processes(work, ...)` starts a process on a work of `tests.helpers`."""
    from tests.helpers.processes import Process

    folder, numbers = tmp_path_factory.mktemp("reports"), count()
    return lambda work, *arguments: Process(folder / f"{next(numbers)}", work, *arguments)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no CUDA device; torch is asked only if there is such a test."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What importing left is no garbage: not to look at it at every collection is a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch, also where `make test-numeric` asks for more: for tests that compare bits of whole runs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Hold torch to its threads once it is imported: tests run side by side, and sums keep their order."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(THREADS)
