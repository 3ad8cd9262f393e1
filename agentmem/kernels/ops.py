"""The operations of the memory, each by the backend that suits its tensors: Triton, numba or plain torch.

`agentmem::step`, `agentmem::scan` and `agentmem::project` are custom operators of torch, opaque to `torch.compile`: a
graph holds one node for each call, whatever runs behind it, and slots are a tensor in it, so other sessions are other
values and never another graph. Which backend runs is decided when a call runs: Triton on a CUDA device where it is
asked for (`runs_triton`) or on a CPU where Triton's interpreter is on, numba for scans on a CPU (`runs_numba`), plain
torch elsewhere and for float64.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from agentmem.errors import StateMismatchError, TurnError
from agentmem.kernels import recurrence, torch_step
from agentmem.kernels.recurrence import MODES, Mode, ScanArgs

_logger = logging.getLogger(__name__)
_HAS_TRITON = find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether operations on this device run as Triton kernels: on CUDA where `AGENTMEM_TRITON=1` asks for them.

    Not by default, since they have run in Triton's interpreter only.
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
    """Whether operations on these run compiled by numba: float32 on a CPU, where numba is installed.

    Not while they are traced. `AGENTMEM_NUMBA=0` turns it off.
    """
    kinds = Tensor, torch.nn.Parameter
    suited = all(type(x) in kinds and x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
    return suited and os.environ.get("AGENTMEM_NUMBA") != "0" and _has_numba() and not torch.compiler.is_compiling()


def step(
    products: Tensor,
    pool: Tensor,
    slots: Tensor,
    layer: int,
    beta_bias: Tensor,
    lambda_bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    normalize: bool = True,
    mode: Mode = "standard",
) -> Tensor:
    """One token a row through one layer's memory: read, then write in place.

    Args:
        products: [B, 3 H r + gates], a row's products with `LayerMemory.packed_weight`; any float type.
        pool: [slots, L, H, r, r] float32, contiguous; changed.
        slots: [B] int32 or int64, the state of every row; -1 = the row is inert, it reads zeros and writes nothing. A
            slot stands at most once.
        layer: which of the L layers.
        beta_bias, lambda_bias: [H r], or [H] where a head has one gate; `lambda_bias` None = lambda is 1 - beta.
        mask: [B] bool, False where a row reads and does not write; None = all write.
        normalize: tanh and unit length for query and key.
        mode: as `MemoryConfig.state_update_mode`.

    Returns:
        The reads [B, H r], of the state from before the write, in the products' type. No gradient passes: what is
        differentiated through a step is refused by the operator, and constant where the kernel is called without it.

    Raises:
        StateMismatchError, TurnError: the pool, or another argument, has another shape or type.
    """
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
    arguments = (products, pool, slots, layer, beta_bias, lambda_bias, mask, normalize, mode)
    reads: Tensor = torch.ops.agentmem.step(*arguments) if _needs_operator(pool) else _run_step(*arguments)
    return reads


def scan(args: ScanArgs, *, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """The rule over many tokens, with gradients, by what is quickest where the tensors lie.

    Args:
        args: `ScanArgs`; none of them is changed.
        chunk: tokens that are composed at a time, where the backend works in chunks; 0 = chosen by length and rank.

    Returns:
        Reads [B, T, H, r] and states [B, H, r, r].

    Raises:
        StateMismatchError, TurnError: the state, or another argument, has another shape or type.
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
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in args)
    if not differentiated and not chunk and runs_numba(*args):
        return _scan_by_numba(args)
    return recurrence.scan_blocked(args, chunk=chunk) if chunk else recurrence.scan(args)


def _scan_by_numba(args: ScanArgs) -> tuple[Tensor, Tensor]:
    """As `recurrence.scan`, of float32 tensors on a CPU; no gradient passes."""
    from agentmem.kernels import numba_scan

    inputs = [x.contiguous() for x in args[1:]]
    last, reads = args.state.clone(memory_format=torch.contiguous_format), torch.empty_like(inputs[0])
    addresses = np.array([x.data_ptr() for x in (*inputs, reads, last)], dtype=np.int64)
    numba_scan.run(addresses, *args.q.shape)
    return reads, last


def project(hidden: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """One product with weights that lie one below the other, for graphs, which must not know where they lie.

    Args:
        hidden: [B, D], any float type.
        parts: each [n, D] of one type. Where they are rows of one tensor in this order, as
            `LayerMemory.packed_weight` leaves them, nothing is copied; that is looked up whenever a graph runs.

    Returns:
        [B, sum of n] in the type of the weights. No gradient passes.
    """
    products: Tensor = torch.ops.agentmem.project(hidden, list(parts))
    return products


def _need(name: str, x: Tensor, shape: tuple[int, ...], *types: torch.dtype) -> None:
    if tuple(x.shape) != shape or (types and x.dtype not in types):
        kind = f" of {' or '.join(map(str, types))}" if types else ""
        raise TurnError(f"{name} must have shape {list(shape)}{kind}; found {x.dtype} {list(x.shape)}")


def _needs_operator(like: Tensor) -> bool:
    """Whether a step must be seen as an operator: by a compiler, by a mode of torch's dispatcher, or by a tensor that
    only stands for one; or whether plain torch computes it.

    Otherwise a kernel is called without one. torch spends 40 us on an operator written in Python, which is more than
    all else of a step, and more than the kernel.
    """
    # The compiler comes first: what stands behind it here is not traced.
    observed = torch.compiler.is_compiling() or type(like) is not Tensor or is_in_torch_dispatch_mode()
    return observed or not _uses_triton(like)


def _uses_triton(like: Tensor) -> bool:
    return like.dtype == torch.float32 and runs_triton(like.device)


def _device_of(like: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()


def _run_step(
    products: Tensor,
    pool: Tensor,
    slots: Tensor,
    layer: int,
    beta_bias: Tensor,
    lambda_bias: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
    rule: str,  # not `mode`: torch hands a keyword of that name to its own dispatch when it traces
) -> Tensor:
    """The operator's work; a kernel reads its arguments as if they were contiguous."""
    if _uses_triton(pool):
        # Triton is imported when the first kernel runs, so that a CPU never waits for it.
        from agentmem.kernels import triton_step

        backend: Any = triton_step
    else:
        backend = torch_step
    vectors = (slots.contiguous(), layer, beta_bias.contiguous(), _contiguous(lambda_bias), _contiguous(mask))
    with torch.no_grad(), _device_of(pool):
        reads: Tensor = backend.step(products, pool, *vectors, normalize, rule)
    return reads


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


_step = torch.library.custom_op("agentmem::step", _run_step, mutates_args=("pool",))


@_step.register_fake
def _(products: Tensor, pool: Tensor, *_: Any) -> Tensor:
    return products.new_empty(products.shape[0], pool.shape[2] * pool.shape[3])


# The scan's operators run Triton alone; they take the seven tensors of `ScanArgs` and the length of a chunk.
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
    """Parts [n, D] as one tensor, without a copy where each begins where the one before it ends."""
    first = parts[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.data_ptr() != end or not part.is_contiguous():
            return torch.cat(parts)
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())
