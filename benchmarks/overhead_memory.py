"""The most memory that a run holds: on a GPU what torch allocated, on a CPU the bytes of the tensors that were alive.

The resident size of a process says little about the latter: glibc keeps what tensors of up to 32 MB gave back, in
pieces that depend on what ran before; one prefill after another of the same bare model was seen to move it by 2.6 %.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Living(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it make, until they are dropped.

    What a kernel takes for itself while it runs is not seen.

    Attributes:
        now: bytes alive.
        most: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._made: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Without gradients an operation made of others arrives whole, and its parts would not be seen.
        with self:
            whole = func.decompose(*args, **kwargs)
        if whole is not NotImplemented:
            return whole
        given = {_place(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        found = func(*args, **kwargs)
        for one in tree_leaves(found):
            if isinstance(one, Tensor) and (place := _place(one)) not in given and place not in self._made:
                storage = one.untyped_storage()
                self._made[place] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._dropped, place).atexit = False
        self.most = max(self.most, self.now)
        return found

    def _dropped(self, place: int) -> None:
        self.now -= self._made.pop(place)


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def peak(run: Callable[[], object], *held: nn.Module) -> int:
    """The most bytes during a run, the parameters and buffers of ``held`` included."""
    gc.collect()
    if torch.cuda.is_available():
        # What earlier captures made for their streams would count for whoever comes later.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    kept = [one for module in held for one in (*module.parameters(), *module.buffers())]
    with Living() as living:
        run()
    return living.most + sum({_place(one): one.untyped_storage().nbytes() for one in kept}.values())
