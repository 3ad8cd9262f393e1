"""The rule as custom operators: Triton kernels on CUDA on request, else plain torch; same arguments and numbers.

``step`` runs one token a row on a pool of states, ``scan`` many tokens with gradients. ``docs/kernels.md`` says what
was checked where.
"""

from __future__ import annotations

from agentmem.kernels.ops import runs_numba, runs_triton, scan, step

__all__ = ["runs_numba", "runs_triton", "scan", "step"]
