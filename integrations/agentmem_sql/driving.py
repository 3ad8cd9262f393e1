"""Driving a generator that yields what it wants done, is sent what came of it, and thrown what went wrong.

What a method does is so written once; whether it blocks a thread or waits in a task is its driver's business.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar

A = TypeVar("A")
T = TypeVar("T")


def drive(steps: Generator[A, Any, T], do: Callable[[A], Any]) -> T:
    """Do what is asked until the generator returns; gives what it returns."""
    try:
        asked = next(steps)
        while True:
            try:
                answer = do(asked)
            except Exception as error:  # noqa: BLE001  (the steps decide what to do about it)
                asked = steps.throw(error)
            else:
                asked = steps.send(answer)
    except StopIteration as end:
        found: T = end.value
        return found


async def adrive(steps: Generator[A, Any, T], do: Callable[[A], Awaitable[Any]]) -> T:
    """``drive`` for a task."""
    try:
        asked = next(steps)
        while True:
            try:
                answer = await do(asked)
            except Exception as error:  # noqa: BLE001  (the steps decide what to do about it)
                asked = steps.throw(error)
            else:
                asked = steps.send(answer)
    except StopIteration as end:
        found: T = end.value
        return found
