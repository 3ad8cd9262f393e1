"""Gradients of the parts of a step, each part computed by a separate process.

The parameters are in shared memory; workers are forks of this process with everything else as it was. The parts are
summed in a fixed order, so the bits of the sum do not depend on the number of processes.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from agentmem.errors import ConfigError, TrainingError

PartLoss = Callable[[int, int], Tensor]
"""The loss of a part (its number) of a step: the parts' losses add up to that of the step."""


class ParallelGradients:
    """Computes the loss of a step and its gradients; a context manager that owns the workers.

    Args:
        parameters: the parameters to differentiate. Their storage is moved into shared memory.
        loss_of: the loss of one part of a step, with its graph (without one where the part has no weight).
        count: parts of a step.
        processes: the number of processes including this one; at most `count` are used. More than one needs a system
            that can fork, and each then runs with a single thread.

    Raises:
        ConfigError: `processes` is less than 1.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], loss_of: PartLoss, *, count: int, processes: int) -> None:
        if processes < 1:
            raise ConfigError(f"training needs at least 1 process, found processes={processes}; leave it out for one")
        self._parameters = list(parameters)
        self._loss_of = loss_of
        self._count = count
        forks = min(processes, count) if "fork" in multiprocessing.get_all_start_methods() else 1
        # The parts of each process; this process has the first share.
        self._shares = [range(i, count, forks) for i in range(forks)]
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._results: dict[int, list[Tensor]] = {}

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        if len(self._shares) > 1:
            torch.set_num_threads(1)  # as in the workers: with several threads the bits of sums would differ
            self._fork()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = []
        torch.set_num_threads(self._threads)

    def run(self, step: int) -> float:
        """The loss of a step; the gradients are left in the parameters (None where no part reaches one).

        Raises:
            TrainingError: a worker failed; the error contains the worker's message.
        """
        for _, pipe in self._workers:
            pipe.send(step)
        losses: dict[int, float] = {}
        gradients: dict[int, list[Tensor | None]] = {}
        for part in self._shares[0]:
            losses[part], gradients[part] = self._of(step, part)
        for (process, pipe), share in zip(self._workers, self._shares[1:], strict=True):
            for part in share:
                losses[part], gradients[part] = self._answer(process, pipe, part)
        for i, parameter in enumerate(self._parameters):
            total: Tensor | None = None
            for part in range(self._count):
                gradient = gradients[part][i]
                if gradient is not None:
                    total = gradient.clone() if total is None else total.add_(gradient)
            parameter.grad = total
        return sum(losses[part] for part in range(self._count))

    def _of(self, step: int, part: int) -> tuple[float, list[Tensor | None]]:
        loss = self._loss_of(step, part)
        if not loss.requires_grad:
            return loss.item(), [None] * len(self._parameters)
        return loss.item(), list(torch.autograd.grad(loss, self._parameters, allow_unused=True))

    def _fork(self) -> None:
        for parameter in self._parameters:
            parameter.data.share_memory_()  # type: ignore[no-untyped-call]
        for share in self._shares[1:]:
            for part in share:
                self._results[part] = [_shared(p) for p in self._parameters]
        context = multiprocessing.get_context("fork")
        for share in self._shares[1:]:
            own_end, worker_end = context.Pipe()
            ends = [own_end, *(pipe for _, pipe in self._workers)]
            process = context.Process(target=self._serve, args=(worker_end, ends, share), daemon=True)
            process.start()
            worker_end.close()
            self._workers.append((process, own_end))

    def _serve(self, pipe: Connection, ends: Sequence[Connection], share: range) -> None:
        """The worker's loop: receive a step's number, send the loss of each of its parts and which gradients exist."""
        torch.set_num_threads(1)  # a fork has none of the threads of its parent's pool
        for end in ends:
            end.close()  # else this copy would keep the pipe open after the main process has died
        while True:
            try:
                step = pipe.recv()
            except (EOFError, KeyboardInterrupt):
                return
            for part in share:
                try:
                    loss, gradients = self._of(step, part)
                    for result, gradient in zip(self._results[part], gradients, strict=True):
                        if gradient is not None:
                            result.copy_(gradient)
                    answer: Any = (loss, [gradient is not None for gradient in gradients])
                except Exception:  # noqa: BLE001 - the first process raises it
                    answer = traceback.format_exc()
                pipe.send(answer)

    def _answer(
        self, process: multiprocessing.process.BaseProcess, pipe: Connection, part: int
    ) -> tuple[float, list[Tensor | None]]:
        try:
            # A dead worker closes its end of the pipe, unless a child of its own still holds it open: so check both.
            while not pipe.poll(5.0):
                if not process.is_alive():
                    raise EOFError
            answer = pipe.recv()
        except (EOFError, OSError):
            process.join(timeout=5)
            raise TrainingError(
                f"a worker was to compute a part of a step; it ended with exit code {process.exitcode}; "
                "run the training again, which goes on from the last checkpoint, with fewer processes if memory ran out"
            ) from None
        if isinstance(answer, str):
            raise TrainingError(f"a worker was to compute a part of a step; it failed:\n{answer}")
        loss, reached = answer
        return loss, [
            result if has_gradient else None for result, has_gradient in zip(self._results[part], reached, strict=True)
        ]


def _shared(like: Tensor) -> Tensor:
    """Zeros in shared memory."""
    zeros: Tensor = torch.zeros_like(like.detach()).share_memory_()  # type: ignore[no-untyped-call]
    return zeros
