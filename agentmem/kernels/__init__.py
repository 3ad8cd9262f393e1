"""The gated delta rule as operations on tensors, each by Triton, numba or plain torch; same arguments and numbers.

`step` runs one token a row on a pool of states, `scan` many tokens with gradients; `project` is the product before a
step as graphs hold it. `docs/kernels.md` says what was checked where.
"""

from __future__ import annotations

from agentmem.kernels.ops import project, runs_numba, runs_triton, scan, step
from agentmem.kernels.recurrence import ScanArgs

__all__ = ["ScanArgs", "project", "runs_numba", "runs_triton", "scan", "step"]
