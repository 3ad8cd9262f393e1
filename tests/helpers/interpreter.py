"""Triton's interpreter, quick enough for tests and rehearsals."""

from __future__ import annotations

from typing import Any


def quicken() -> None:
    """Prepare each module once. To be called before the first kernel runs in the interpreter (`TRITON_INTERPRET=1`).

    The interpreter prepares triton.language anew for every call of a function that a kernel calls (tl.sum is one),
    which takes most of its time; once for each module is enough, and the launch has seen to the rest.
    """
    from triton.runtime import interpreter

    prepared: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in prepared:
            prepared.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
