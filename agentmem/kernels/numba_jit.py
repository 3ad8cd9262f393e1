"""How functions that work on memory addresses are compiled by numba: typed pointers, and the compiler's settings.

Calling a function that takes addresses costs a microsecond; with tensors or arrays it costs several times as much.
The first import of a compiled module takes a second or two. Later ones, in other processes too, load the code from
numba's cache (next to the module, or in the user's cache directory where that is not writable).
"""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.extending import intrinsic

__all__ = ["address", "compiled", "floats", "inlined", "numbers", "octets"]

address = types.intp

# Without the flags that rule out infinity and NaN: a model may compute either.
_FAST = {"reassoc", "contract", "arcp", "nsz"}


def _pointer(kind: Any) -> Any:
    """A function for compiled code that turns an address into a pointer to numbers of one type."""

    @intrinsic
    def at(_typing: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.intp), generate

    return at


floats, numbers, octets = map(_pointer, (types.float32, types.int64, types.uint8))


def compiled(signature: Any, function: Any, *, nogil: bool = False) -> Any:
    """A function compiled for one signature; the code is cached on disk for other processes where possible.

    `nogil`: release the GIL, so that other threads run meanwhile. Returns the compiled entry point itself, because
    numba's dispatcher, which first checks the argument types, takes longer than a layer's read.
    """
    try:
        made = njit(signature, fastmath=_FAST, error_model="numpy", nogil=nogil, cache=True)(function)
    except Exception:  # noqa: BLE001 - no writable directory, a full disk, a truncated file
        made = njit(signature, fastmath=_FAST, error_model="numpy", nogil=nogil)(function)
    (code,) = made.overloads.values()
    return code.entry_point


def inlined(function: Any) -> Any:
    """A function that is inlined into compiled ones."""
    return njit(fastmath=_FAST, error_model="numpy", inline="always")(function)
