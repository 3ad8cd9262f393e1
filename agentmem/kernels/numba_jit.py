"""What numba compiles functions of addresses with: numbers at an address, and the compiler's settings.

Functions that take addresses are called in a microsecond; with tensors or arrays a call would take several times as
long.
The first import of what is compiled takes a second or two; later ones, of other processes too, find the code in numba's
cache (beside the module, or the user's cache directory where that cannot be written).
"""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.extending import intrinsic

__all__ = ["address", "compiled", "floats", "inlined", "numbers", "octets"]

address = types.intp

# No promise that no number is infinite or NaN: what a model computes may be.
_FAST = {"reassoc", "contract", "arcp", "nsz"}


def _pointer(kind: Any) -> Any:
    """A function of compiled code: the numbers of a kind at an address."""

    @intrinsic
    def at(_typing: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.intp), generate

    return at


floats, numbers, octets = map(_pointer, (types.float32, types.int64, types.uint8))


def compiled(signature: Any, function: Any, *, nogil: bool = False) -> Any:
    """A function compiled for one signature; its code is kept for other processes where there is a place for it.

    `nogil`: other threads run meanwhile. Returns the compiled entry point itself: numba's dispatcher, which looks at
    the types of arguments first, takes longer than a layer's read.
    """
    try:
        made = njit(signature, fastmath=_FAST, error_model="numpy", nogil=nogil, cache=True)(function)
    except Exception:  # noqa: BLE001 - no directory that can be written, a full disk, a file that was cut off
        made = njit(signature, fastmath=_FAST, error_model="numpy", nogil=nogil)(function)
    (code,) = made.overloads.values()
    return code.entry_point


def inlined(function: Any) -> Any:
    """A function that compiled ones contain."""
    return njit(fastmath=_FAST, error_model="numpy", inline="always")(function)
