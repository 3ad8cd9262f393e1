"""What a benchmark says about itself, and how it draws: hardware, versions, command; a picture where matplotlib is."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import agentmem
from agentmem.generation.cuda_graph import uses_graphs
from agentmem.kernels import runs_numba, runs_triton


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware(device: torch.device) -> str:
    """What computes on this device, how many threads feed it, and how busy the machine is."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) of torch{load}"


def versions() -> str:
    """Of what was measured with, and the day."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"agentmem {agentmem.__version__}; {datetime.now(UTC):%Y-%m-%d}"
    )


def command() -> str:
    """As it can be given again."""
    return f"python {shlex.join(sys.argv)}"


def decoding(device: torch.device, dtype: torch.dtype) -> str:
    """By what the memory computes a token that is decoded."""
    if uses_graphs(device):
        return "Triton kernels in CUDA graphs"
    if runs_triton(device):
        return "Triton kernels"
    if runs_numba(torch.empty(0, dtype=dtype, device=device)):
        return f"calls compiled by numba {version('numba')} (AGENTMEM_NUMBA=0 turns them off)"
    return "operations of torch"


def attention() -> str:
    """By what scaled dot products may be computed on CUDA. cuDNN plans for every new length, which may take longer than
    the token."""
    backends = torch.backends.cuda
    may = {
        "flash": backends.flash_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
        "cuDNN": backends.cudnn_sdp_enabled(),
        "plain": backends.math_sdp_enabled(),
    }
    low = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED", "not set")
    return f"{', '.join(name for name, on in may.items() if on)}; TORCH_CUDNN_SDPA_DEPRIORITIZED {low}"


def conditions(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Under which a benchmark of decoding runs, by name; after the number of threads was set."""
    return {
        "hardware": hardware(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
        "memory decodes by": decoding(device, dtype),
        **({"attention": attention()} if device.type == "cuda" else {}),
        "command": command(),
    }


def text(said: dict[str, str]) -> str:
    """Conditions, a line each."""
    return "\n".join(f"{name}: {value}" for name, value in said.items())


def picture(path: Path, size: tuple[float, float], paint: Callable[[Any], None]) -> str:
    """Draw on a figure of ``size`` inches into a file; says where it is, or why there is none."""
    try:
        import matplotlib as mpl
    except ImportError:
        return "no picture: matplotlib is not installed"
    mpl.use("Agg")  # also where there is a screen
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=size, layout="constrained")
    paint(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return f"picture: {path}"
