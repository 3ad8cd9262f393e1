"""Where the time goes: what a GPU (or a CPU) does in a run, by the profiler, and in which three places most of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from counting import on_device
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

IDLE = "nothing runs on the GPU"
_WIDTH = 90  # names of kernels can have thousands of characters


def spent(run: Callable[[], object], device: torch.device, times: int = 1) -> Counter[str]:
    """Milliseconds of a run by kernel, and where none ran; on a CPU by operation. The mean of as many as asked."""
    run()  # what is compiled or captured once does not count
    cuda = device.type == "cuda"
    # An engine computes in a thread of its own.
    every_thread = _ExperimentalConfig(profile_all_threads=True)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities, experimental_config=every_thread) as seen:
        begin = time.perf_counter()
        for _ in range(times):
            run()
        if cuda:
            torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - begin)
    found: Counter[str] = Counter()
    if cuda:
        for event in on_device(seen.events()):
            found[event.name] += event.time_range.elapsed_us() / 1e3
        found[IDLE] = max(0.0, wall - found.total())
    else:
        for event in seen.key_averages():
            found[event.key] += event.self_cpu_time_total / 1e3
    return Counter({name: value / times for name, value in found.items()})


def allocated(run: Callable[[], object], device: torch.device) -> Counter[str]:
    """Megabytes that operations take and do not give back themselves."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda], profile_memory=True) as seen:
        run()
    found: Counter[str] = Counter()
    for event in seen.key_averages():
        found[event.key] += (event.self_device_memory_usage if cuda else event.self_cpu_memory_usage) / 2**20
    return found


def top(found: Mapping[str, float], bare: Mapping[str, float] | None = None, unit: str = "ms") -> list[str]:
    """The three largest; with `bare` by how much more each is."""
    more = {name: value - (bare or {}).get(name, 0.0) for name, value in found.items()}
    largest = sorted(more.items(), key=lambda entry: -entry[1])[:3]
    sign = "" if bare is None else "+"
    return [f"{sign}{value:.3f} {unit}: {name[:_WIDTH]}" for name, value in largest if value > 0]
