"""The gated delta rule as tensor operations, in Triton, numba or plain torch, with the same arguments and results.

`step` runs one token per row on a pool of states; `scan` runs many tokens, with gradients; `project` is the product
before a step, in a form for compiled graphs. `docs/kernels.md` says what was checked on which devices.
"""

from __future__ import annotations

from agentmem.kernels.ops import project, runs_numba, runs_triton, scan, step
from agentmem.kernels.recurrence import ScanArgs, StepArgs

__all__ = ["ScanArgs", "StepArgs", "project", "runs_numba", "runs_triton", "scan", "step"]
