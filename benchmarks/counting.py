"""How much there is to do for a step: operations that torch dispatches, and kernels that a GPU runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

_COPIES = ("Memcpy HtoD", "Memcpy DtoH")


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(step: Callable[[], object]) -> int:
    """Operations of torch's dispatcher that are no views; what runs beside it (numba's calls) is not among them."""
    step()
    with _Counting() as counting:
        step()
    found: int = counting.count
    return found


def kernels(step: Callable[[], object]) -> int | None:
    """What a GPU runs for a step, by torch's profiler; None where that sees nothing of the GPU."""
    # What is compiled or set up once is not counted, nor is what setting up the profiler loses of its first step.
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
    return ran(seen.events()) or None


def ran(events: Iterable[Any], on: DeviceType = DeviceType.CUDA) -> int:
    """How many of a profiler's events ran on a device."""
    return sum(1 for _ in on_device(events, on))


def on_device(events: Iterable[Any], on: DeviceType = DeviceType.CUDA) -> Iterator[Any]:
    """A profiler's events that ran on a device: kernels, fills and copies within it.

    Not among them: what only marks a span of time, and copies from and to the CPU.
    """
    for event in events:
        if event.device_type == on and not event.is_user_annotation and not event.name.startswith(_COPIES):
            yield event
