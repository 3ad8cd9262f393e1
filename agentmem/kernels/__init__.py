"""The rule as custom operators: Triton kernels on CUDA on request, else plain torch; same arguments and numbers.

``step`` runs one token a row on a pool of states, ``scan`` many tokens with gradients; ``project`` is the product
before a step as graphs hold it. ``docs/kernels.md`` says what was checked where.
"""

from __future__ import annotations

from agentmem.kernels.ops import project, runs_numba, runs_triton, scan, step

__all__ = ["project", "runs_numba", "runs_triton", "scan", "step"]
