"""The operations as custom operators of torch: ``agentmem::step``, ``agentmem::scan``, and ``agentmem::project``.

Opaque to ``torch.compile``: a graph holds one node for each call, whatever runs behind it, and slots and borders are
tensors in it, so other sessions are other values and never another graph. Which backend runs is decided when a call
runs: Triton on a CUDA device where it is asked for (``runs_triton``), or on a CPU where Triton's interpreter is on;
plain torch elsewhere, and for float64.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from agentmem.errors import StateMismatchError, TurnError
from agentmem.kernels import torch_ops

_logger = logging.getLogger(__name__)
Mode = Literal["standard", "lambda_outside", "no_lambda"]
MODES = {"standard": 0, "lambda_outside": 1, "no_lambda": 2}
"""Update modes as compiled kernels are told them."""
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether operations on this device run as Triton kernels: on CUDA where ``AGENTMEM_TRITON=1`` asks for them.

    Not by default while they have run in Triton's interpreter only.
    """
    asked = device.type == "cuda" and os.environ.get("AGENTMEM_TRITON") == "1"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (asked or interpreted) and _has_triton()


@cache
def _has_numba() -> bool:
    if find_spec("numba") is None:
        return False
    try:
        from agentmem.kernels import numba_scan, numba_step  # noqa: F401
    except Exception as error:  # noqa: BLE001 - of another NumPy, for another processor, ...: torch can do it all
        _logger.warning("numba is installed and cannot be used, so torch computes what it would have: %s", error)
        return False
    return True


def runs_numba(*given: Tensor) -> bool:
    """Whether operations on these run compiled by numba: float32 on a CPU, where numba is installed.

    Not while they are traced. ``AGENTMEM_NUMBA=0`` turns it off.
    """
    kinds = Tensor, torch.nn.Parameter
    fits = all(type(one) in kinds and one.device.type == "cpu" and one.dtype == torch.float32 for one in given)
    return fits and os.environ.get("AGENTMEM_NUMBA") != "0" and _has_numba() and not torch.compiler.is_compiling()


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
        products: [B, 3 H r + gates], a row's products with ``LayerMemory.packed_weight``; any float type.
        pool: [slots, L, H, r, r] float32, contiguous; changed.
        slots: [B] int32 or int64, the state of every row; -1 = the row is inert, it reads zeros and writes nothing. A
            slot stands at most once.
        layer: which of the L layers.
        beta_bias, lambda_bias: [H r], or [H] where a head has one gate; ``lambda_bias`` None = lambda is 1 - beta.
        mask: [B] bool, False where a row reads and does not write; None = all write.
        normalize: tanh and unit length for query and key.
        mode: as ``MemoryConfig.state_update_mode``.

    Returns:
        The reads [B, H r], of the state from before the write, in the products' type. No gradient passes: what is
        differentiated through a step is refused by the operator, and constant where the kernel is called without it.

    Raises:
        StateMismatchError, TurnError: the pool, or another argument, has another shape or type.
    """
    fits = pool.dim() == 5 and pool.shape[3] == pool.shape[4] and pool.is_contiguous()
    if not fits or pool.dtype not in (torch.float32, torch.float64):
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
    if not 0 <= layer < layers or mode not in ("standard", "lambda_outside", "no_lambda"):
        raise TurnError(f"layer must be 0 to {layers - 1} and mode an update mode; found {layer} and {mode!r}")
    given = (products, pool, slots, layer, beta_bias, lambda_bias, mask, normalize, mode)
    reads: Tensor = torch.ops.agentmem.step(*given) if _seen(pool) else _stepped(*given)
    return reads


def scan(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    erase: Tensor,
    write: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """The rule over many tokens, as ``recurrence.scan`` and with its gradients, for batches of equal or of any lengths.

    Args:
        state: [B, H, r, r] float32.
        q, k, v, keep, erase, write: [B, T, H, r], or with ``cu_seqlens`` [1, N, H, r], sequences one after another.
        mask: [B, T] or [1, N] bool, False where a token does not write, whatever its k, v and gates hold.
        cu_seqlens: [B + 1] int32 or int64, ascending: sequence b is the tokens from cu_seqlens[b] to cu_seqlens[b + 1].
        max_length: with ``cu_seqlens``, the longest sequence or more; None = N, which costs idle programs. Borders that
            lie on a GPU are not looked at, which would be to wait: there a longer sequence has no defined result.
        chunk: tokens that are composed at a time; 0 = chosen by length and rank.

    Returns:
        Reads, in the shape of q (zeros for tokens of no sequence), and states [B, H, r, r].

    Raises:
        StateMismatchError, TurnError: the state, or another argument, has another shape or type.
    """
    if state.dim() != 4 or state.shape[2] != state.shape[3] or state.dtype not in (torch.float32, torch.float64):
        raise StateMismatchError(f"a state must be float32 [B, H, r, r]; found {state.dtype} {list(state.shape)}")
    batch, heads, rank, _ = state.shape
    if cu_seqlens is not None:
        _need("cu_seqlens", cu_seqlens, (batch + 1,), torch.int32, torch.int64)
    rows, length = (1 if cu_seqlens is not None else batch), q.shape[1]
    for name, one in {"q": q, "k": k, "v": v, "keep": keep, "erase": erase, "write": write}.items():
        _need(name, one, (rows, length, heads, rank), state.dtype)
    if mask is not None:
        _need("mask", mask, (rows, length), torch.bool)
    if chunk < 0:
        raise TurnError(f"chunk must be 0 or more; found {chunk}")
    longest = length if max_length is None or cu_seqlens is None else min(max_length, length)
    found: tuple[Tensor, Tensor] = torch.ops.agentmem.scan(
        state, q, k, v, keep, erase, write, mask, cu_seqlens, longest, chunk
    )
    return found


def project(hidden: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """One product with weights of which one lies below the other, for graphs, which must not know where they lie.

    Args:
        hidden: [B, D], any float type.
        parts: each [n, D] of one type. Where they are rows of one tensor in this order, as
            ``LayerMemory.packed_weight`` leaves them, nothing is copied; that is looked up whenever a graph runs.

    Returns:
        [B, sum of n] in the type of the weights. No gradient passes.
    """
    products: Tensor = torch.ops.agentmem.project(hidden, list(parts))
    return products


def _need(name: str, found: Tensor, shape: tuple[int, ...], *types: torch.dtype) -> None:
    if tuple(found.shape) != shape or (types and found.dtype not in types):
        kind = f" of {' or '.join(map(str, types))}" if types else ""
        raise TurnError(f"{name} must have shape {list(shape)}{kind}; found {found.dtype} {list(found.shape)}")


def _stepped(
    products: Tensor,
    pool: Tensor,
    slots: Tensor,
    layer: int,
    beta_bias: Tensor,
    lambda_bias: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
    rule: str,  # not ``mode``: torch hands a keyword of that name to its own dispatch when it traces
) -> Tensor:
    """The operator's work; a kernel reads its arguments as if they lay dense."""
    vectors = (slots.contiguous(), layer, beta_bias.contiguous(), _dense(lambda_bias), _dense(mask))
    with torch.no_grad(), _beside(pool):
        reads: Tensor = _steps(pool).step(products, pool, *vectors, normalize, rule)
    return reads


_step = torch.library.custom_op("agentmem::step", _stepped, mutates_args=("pool",))


@_step.register_fake
def _(products: Tensor, pool: Tensor, *_: Any) -> Tensor:
    return products.new_empty(products.shape[0], pool.shape[2] * pool.shape[3])


@torch.library.custom_op("agentmem::scan", mutates_args=())
def _scan(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    erase: Tensor,
    write: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_length: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu" and len(cu_seqlens) > 1:
        longest = int(cu_seqlens.diff().max())
        if longest > max_length:
            raise TurnError(f"max_length must be the longest sequence, {longest} tokens, or more; found {max_length}")
    inputs = tuple(x.contiguous() for x in (q, k, v, keep, erase, write))
    given = (state.contiguous(), inputs, _dense(mask), _borders(cu_seqlens, q))
    with _beside(state):
        y, last = _scans(state).scan(*given, max_length, chunk)
    return y, last


@_scan.register_fake
def _(state: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), state.new_empty(state.shape)


@torch.library.custom_op("agentmem::scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dlast: Tensor,
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    erase: Tensor,
    write: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_length: int,
    chunk: int,
) -> Seven:
    inputs = tuple(x.contiguous() for x in (q, k, v, keep, erase, write))
    given = (dy.contiguous(), dlast.contiguous(), state.contiguous(), inputs, _dense(mask), _borders(cu_seqlens, q))
    with _beside(state):
        return tuple(_backwards(state).scan_backward(*given, max_length, chunk))


@_scan_backward.register_fake
def _(dy: Tensor, dlast: Tensor, state: Tensor, *inputs: Any) -> Seven:
    return tuple(x.new_empty(x.shape) for x in (state, *inputs[:6]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_length, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.agentmem.scan_backward(dy, dlast, *ctx.saved_tensors, ctx.max_length, ctx.chunk)
    return (*found, None, None, None, None)


_scan.register_autograd(_differentiate, setup_context=_remember)


@torch.library.custom_op("agentmem::project", mutates_args=())
def _project(hidden: Tensor, parts: list[Tensor]) -> Tensor:
    weight = _joined(parts)
    return F.linear(hidden.to(weight.dtype), weight)


@_project.register_fake
def _(hidden: Tensor, parts: list[Tensor]) -> Tensor:
    return hidden.new_empty(hidden.shape[0], sum(len(one) for one in parts), dtype=parts[0].dtype)


def _joined(parts: list[Tensor]) -> Tensor:
    """Without a copy where each part begins where the one before it ends."""
    first = parts[0]
    memory, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for one in parts:
        if one.untyped_storage().data_ptr() != memory or one.data_ptr() != end or not one.is_contiguous():
            return torch.cat(parts)
        end += one.nbytes
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _borders(cu_seqlens: Tensor | None, like: Tensor) -> Tensor | None:
    """Where the tokens lie: borders may be given on a CPU."""
    return None if cu_seqlens is None else cu_seqlens.to(like.device).contiguous()


def _seen(like: Tensor) -> bool:
    """Whether somebody looks at operators: a compiler, a mode of torch's dispatcher, a tensor that only stands for one.

    Where nobody does, a kernel is called without one. torch spends 40 us on an operator of Python's, which is more than
    all else of a step, and more than the kernel.
    """
    # The compiler first: what stands behind it here is not traced.
    seen = torch.compiler.is_compiling() or type(like) is not Tensor or is_in_torch_dispatch_mode()
    return seen or not _kernels(like)


def _beside(like: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()


def _kernels(like: Tensor) -> bool:
    return like.dtype == torch.float32 and runs_triton(like.device)


# Triton is imported when the first kernel runs, so that a CPU never waits for it.


def _steps(like: Tensor) -> ModuleType:
    if not _kernels(like):
        return torch_ops
    from agentmem.kernels import triton_step

    return triton_step


def _scans(like: Tensor) -> ModuleType:
    if not _kernels(like):
        return torch_ops
    from agentmem.kernels import triton_scan

    return triton_scan


def _backwards(like: Tensor) -> ModuleType:
    if not _kernels(like):
        return torch_ops
    from agentmem.kernels import triton_scan_backward

    return triton_scan_backward
