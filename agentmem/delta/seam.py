"""Where a pass meets the model: a projection's forward with the running pass behind it, in the place of its own.

Not a forward hook, though it does what one would: a module with a hook is called the long way, which fetches 20
microseconds of code more where weights have gone through the caches, a hundredth of a token on 12 layers of 1,024.
What others put on the module stays: their hooks see the corrected output, and a forward that was there already
(accelerate's, say) is the one that is called.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from agentmem.delta.passes import Place, Through


class Running(Protocol):
    """Who knows the running pass."""

    through: Through | None


class Seam:
    """The forward of a projection while memory is attached; a deep copy of the module, or a pickled one, is bare.

    Args:
        module: the projection.
        place: what is corrected in its output.
        running: asked for the pass at every call.
    """

    __slots__ = ("_before", "_forward", "_module", "_place", "_running")

    def __init__(self, module: nn.Module, place: Place, running: Running) -> None:
        self._module, self._place, self._running = module, place, running
        self._before: Callable[..., Tensor] | None = vars(module).get("forward")
        self._forward: Callable[..., Tensor] = module.forward
        module.forward = self

    def __call__(self, *inputs: Any, **more: Any) -> Tensor:
        output = self._forward(*inputs, **more)
        through = self._running.through
        return output if through is None else through(self._place, inputs[0], output)

    def remove(self) -> None:
        """Give the module its own forward back; one that was put around this since stays, and finds no pass."""
        top = vars(self._module).get("forward")
        if top is self and self._before is None:
            del self._module.forward
        elif top is self:
            self._module.forward = self._before
        while isinstance(top, Seam):
            if top._forward is self:  # of another memory, attached later
                top._forward, top._before = self._forward, self._before
            top = top._forward

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied or pickled with its module: the forward without memory, of the copy."""
        if self._before is not None:
            return _same, (self._before,)
        return _own, (self._module,)


def _same(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return forward


def _own(module: nn.Module) -> Callable[..., Tensor]:
    return MethodType(type(module).forward, module)
