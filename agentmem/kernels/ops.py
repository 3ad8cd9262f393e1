"""The memory's operations, each run by the backend that suits its tensors: Triton, numba or plain torch.

`agentmem::step`, `agentmem::scan` and `agentmem::project` are custom operators of torch, opaque to `torch.compile`: a
graph has one node per call, whichever backend runs it. Slots are a tensor in the graph, so other sessions mean other
values and never another graph. The backend is chosen when a call runs: Triton on a CUDA device if it is enabled
(`runs_triton`), or on a CPU if Triton's interpreter is on; numba for scans on a CPU (`runs_numba`); plain torch
otherwise, and always for float64.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from agentmem.errors import StateMismatchError, TurnError
from agentmem.kernels import recurrence, torch_step
from agentmem.kernels.recurrence import MODES, ScanArgs, StepArgs

_logger = logging.getLogger(__name__)
_HAS_TRITON = find_spec("triton") is not None
_WORTH_THREADS = 1 << 22  # numbers of all states times tokens: below, starting threads costs more than it brings


def runs_triton(device: torch.device) -> bool:
    """Whether operations on this device run as Triton kernels: on CUDA if `AGENTMEM_TRITON=1` enables them.

    Off by default, since the kernels have only been run in Triton's interpreter.
    """
    requested = device.type == "cuda" and os.environ.get("AGENTMEM_TRITON") == "1"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (requested or interpreted) and _HAS_TRITON


@cache
def _has_numba() -> bool:
    if find_spec("numba") is None:
        return False
    try:
        from agentmem.kernels import numba_scan, numba_step  # noqa: F401
    except Exception as error:  # noqa: BLE001 - made for another NumPy, another processor, ...: torch can do it all
        _logger.warning("numba is installed and cannot be used, so torch computes what it would have: %s", error)
        return False
    return True


def runs_numba(*tensors: Tensor) -> bool:
    """Whether operations on these tensors run compiled by numba: float32 on a CPU, if numba is installed.

    Not while they are being traced. `AGENTMEM_NUMBA=0` turns numba off.
    """
    kinds = Tensor, torch.nn.Parameter
    suited = all(type(x) in kinds and x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
    return suited and os.environ.get("AGENTMEM_NUMBA") != "0" and _has_numba() and not torch.compiler.is_compiling()


def step(args: StepArgs) -> Tensor:
    """One token per row through one layer's memory: read, then write in place.

    Args:
        args: `StepArgs`; its pool is changed.

    Returns:
        The reads [B, H r] of the state before the write, in the dtype of the products. There are no gradients: the
        operator refuses to be differentiated, and where a kernel is called without the operator its result is a
        constant.

    Raises:
        StateMismatchError, TurnError: the pool, or another argument, has the wrong shape or dtype.
    """
    products, pool, slots, layer, beta_bias, lambda_bias, mask, _, mode = args
    suited = pool.dim() == 5 and pool.shape[3] == pool.shape[4] and pool.is_contiguous()
    if not suited or pool.dtype not in (torch.float32, torch.float64):
        raise StateMismatchError(
            "a pool must be float32 [slots, L, H, r, r] and contiguous, since it is changed in place; "
            f"found {pool.dtype} {list(pool.shape)}, strides {list(pool.stride())}"
        )
    batch, (_, layers, heads, rank, _) = products.shape[0], pool.shape
    gates = beta_bias.shape[0] * (1 if lambda_bias is None else 2)
    _need("products", products, (batch, 3 * heads * rank + gates))
    _need("slots", slots, (batch,), torch.int32, torch.int64)
    if beta_bias.shape[0] not in (heads, heads * rank):
        raise TurnError(f"beta_bias must have shape [{heads}] or [{heads * rank}]; found {list(beta_bias.shape)}")
    if lambda_bias is not None:
        _need("lambda_bias", lambda_bias, tuple(beta_bias.shape))
    if mask is not None:
        _need("mask", mask, (batch,), torch.bool)
    if not 0 <= layer < layers or mode not in MODES:
        raise TurnError(f"layer must be 0 to {layers - 1} and mode an update mode; found {layer} and {mode!r}")
    reads: Tensor = torch.ops.agentmem.step(*args) if _needs_operator(pool) else _run_step(*args)
    return reads


def scan(args: ScanArgs, *, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """The update rule over many tokens, with gradients, by the fastest backend for these tensors.

    Args:
        args: `ScanArgs`; not changed.
        chunk: tokens per chunk, where the backend works in chunks; 0 = chosen by length and rank.

    Returns:
        Reads [B, T, H, r] and states [B, H, r, r].

    Raises:
        StateMismatchError, TurnError: the state, or another argument, has the wrong shape or dtype.
    """
    state = args.state
    if state.dim() != 4 or state.shape[2] != state.shape[3] or state.dtype not in (torch.float32, torch.float64):
        raise StateMismatchError(f"a state must be float32 [B, H, r, r]; found {state.dtype} {list(state.shape)}")
    batch, heads, rank, _ = state.shape
    shape = (batch, args.q.shape[1], heads, rank)
    for name, x in zip(ScanArgs._fields[1:], args[1:], strict=True):
        _need(name, x, shape, state.dtype)
    if chunk < 0:
        raise TurnError(f"chunk must be 0 or more; found {chunk}")
    if _uses_triton(state):
        results: tuple[Tensor, Tensor] = torch.ops.agentmem.scan(*args, chunk)
        return results
    if not chunk and runs_numba(*args):
        if torch.is_grad_enabled() and any(x.requires_grad for x in args):
            by_numba: tuple[Tensor, Tensor] = _NumbaScan.apply(*args)  # type: ignore[no-untyped-call]
            return by_numba
        return _scan_by_numba(args)
    return recurrence.scan_blocked(args, chunk=chunk) if chunk else recurrence.scan(args)


def _scan_by_numba(args: ScanArgs) -> tuple[Tensor, Tensor]:
    """As `recurrence.scan`, for float32 tensors on a CPU; no gradients."""
    from agentmem.kernels import numba_scan

    inputs = [x.contiguous() for x in args[1:]]
    last, reads = args.state.clone(memory_format=torch.contiguous_format), torch.empty_like(inputs[0])
    _share_out(numba_scan.run, (*inputs, reads, last), args.q.shape)
    return reads, last


class _NumbaScan(torch.autograd.Function):
    """The scan by numba with gradients, which are not differentiable themselves."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        args = ScanArgs(*(x.contiguous() for x in tensors))
        ctx.save_for_backward(*args)
        return _scan_by_numba(args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
        from agentmem.kernels import numba_scan

        args = ScanArgs(*ctx.saved_tensors)
        grads = dlast.clone(memory_format=torch.contiguous_format)
        others = [torch.zeros_like(x) for x in args[1:]]
        _share_out(numba_scan.run_backward, (*args, dy.contiguous(), grads, *others), args.q.shape)
        return grads, *others


def _share_out(run: Any, tensors: Sequence[Tensor], shape: Sequence[int]) -> None:
    """Run a compiled scan over all sequences and heads, in as many threads as torch has."""
    batch, length, heads, rank = shape
    addresses = np.array([x.data_ptr() for x in tensors], dtype=np.int64)
    sequences = batch * heads
    threads = min(torch.get_num_threads(), sequences) if sequences * length * rank * rank > _WORTH_THREADS else 1
    if threads <= 1:
        run(addresses, 0, sequences, length, heads, rank)
        return
    borders = [sequences * n // threads for n in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda a, b: run(addresses, a, b, length, heads, rank), borders[:-1], borders[1:]))


def project(hidden: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """One product with weights that are stacked in memory; for compiled graphs, which cannot know their addresses.

    Args:
        hidden: [B, D], any float type.
        parts: each [n, D], all of one dtype. Where they are consecutive rows of one tensor, as
            `LayerMemory.packed_weight` leaves them, nothing is copied; this is checked each time a graph runs.

    Returns:
        [B, sum of n] in the dtype of the weights. No gradients.
    """
    products: Tensor = torch.ops.agentmem.project(hidden, list(parts))
    return products


def _need(name: str, x: Tensor, shape: tuple[int, ...], *types: torch.dtype) -> None:
    if tuple(x.shape) != shape or (types and x.dtype not in types):
        kind = f" of {' or '.join(map(str, types))}" if types else ""
        raise TurnError(f"{name} must have shape {list(shape)}{kind}; found {x.dtype} {list(x.shape)}")


def _needs_operator(like: Tensor) -> bool:
    """Whether a step must go through the operator.

    It must if a compiler, a mode of torch's dispatcher or a tensor subclass has to see it, or if plain torch runs it.

    Otherwise the kernel is called directly. For an operator written in Python torch needs 40 us, more than for
    everything else in a step, the kernel included.
    """
    # The compiler is asked first: it does not trace what follows in this expression.
    observed = torch.compiler.is_compiling() or type(like) is not Tensor or is_in_torch_dispatch_mode()
    return observed or not _uses_triton(like)


def _uses_triton(like: Tensor) -> bool:
    return like.dtype == torch.float32 and runs_triton(like.device)


def _device_of(like: Tensor) -> AbstractContextManager[object]:
    """Makes the tensors' device the current one, on which Triton launches its kernels."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()


def _run_step(*arguments: Any) -> Tensor:
    """The operator's implementation. Its arguments are made contiguous, as the kernels assume."""
    args = StepArgs(*arguments)
    if _uses_triton(args.pool):
        # Triton is imported when the first kernel runs, so that nothing on a CPU has to wait for the import.
        from agentmem.kernels import triton_step

        backend: Any = triton_step
    else:
        backend = torch_step
    args = args._replace(
        slots=args.slots.contiguous(),
        beta_bias=args.beta_bias.contiguous(),
        lambda_bias=_contiguous(args.lambda_bias),
        mask=_contiguous(args.mask),
    )
    with torch.no_grad(), _device_of(args.pool):
        reads: Tensor = backend.step(args)
    return reads


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


_step = torch.library.custom_op(
    "agentmem::step",
    _run_step,
    mutates_args=("pool",),
    # `rule` and not `mode`: while tracing, torch passes a keyword of that name to its own dispatch.
    schema="(Tensor products, Tensor(a!) pool, Tensor slots, SymInt layer, Tensor beta_bias, Tensor? lambda_bias, "
    "Tensor? mask, bool normalize, str rule) -> Tensor",
)


@_step.register_fake
def _(products: Tensor, pool: Tensor, *_: Any) -> Tensor:
    return products.new_empty(products.shape[0], pool.shape[2] * pool.shape[3])


# The operators of the scan run Triton only; they take the seven tensors of `ScanArgs` and a chunk length.
_SEVEN = ", ".join(f"Tensor {name}" for name in ScanArgs._fields)


@torch.library.custom_op("agentmem::scan", mutates_args=(), schema=f"({_SEVEN}, int chunk) -> (Tensor, Tensor)")
def _scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    from agentmem.kernels import triton_scan

    *tensors, chunk = arguments
    args = ScanArgs(*(x.contiguous() for x in tensors))
    with _device_of(args.state):
        return triton_scan.scan(args, chunk)


@_scan.register_fake
def _(state: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), state.new_empty(state.shape)


@torch.library.custom_op(
    "agentmem::scan_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor dlast, {_SEVEN}, int chunk) -> ({', '.join(['Tensor'] * 7)})",
)
def _scan_backward(dy: Tensor, dlast: Tensor, *arguments: Any) -> ScanArgs:
    from agentmem.kernels import triton_scan

    *tensors, chunk = arguments
    args = ScanArgs(*(x.contiguous() for x in tensors))
    with _device_of(args.state):
        return triton_scan.scan_backward(dy.contiguous(), dlast.contiguous(), args, chunk)


@_scan_backward.register_fake
def _(dy: Tensor, dlast: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[:7])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.agentmem.scan_backward(dy, dlast, *ctx.saved_tensors, ctx.chunk), None)


_scan.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("agentmem::project", mutates_args=())
def _project(hidden: Tensor, parts: list[Tensor]) -> Tensor:
    weight = _one_below_the_other(parts)
    return F.linear(hidden.to(weight.dtype), weight)


@_project.register_fake
def _(hidden: Tensor, parts: list[Tensor]) -> Tensor:
    return hidden.new_empty(hidden.shape[0], sum(len(part) for part in parts), dtype=parts[0].dtype)


def _one_below_the_other(parts: list[Tensor]) -> Tensor:
    """The parts [n, D] as one tensor, without a copy where each begins where the previous one ends."""
    first = parts[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.data_ptr() != end or not part.is_contiguous():
            return torch.cat(parts)
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())
