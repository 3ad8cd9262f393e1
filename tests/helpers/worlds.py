"""An engine with things to tell it and ask it about."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from langchain_core.messages import BaseMessage

from agentmem.nano.recipe.language import Binding, draw_bindings, filler, is_correct, mine, redraw
from agentmem_langgraph import ChatDeltaMem


@dataclass
class World:
    """An engine, and things to tell it and ask it about. Bindings are drawn from a fixed seed."""

    engine: Any
    bindings: list[Binding]
    changed: list[Binding]

    def llm(self, **options: Any) -> ChatDeltaMem:
        return ChatDeltaMem(engine=self.engine, **options)

    def tell(self, n: int) -> str:
        name = mine(self.bindings[n].attribute)
        return f"{name[0].upper()}{name[1:]} is {self.bindings[n].value}."

    def change(self, n: int) -> str:
        return f"Actually, {mine(self.changed[n].attribute)} is now {self.changed[n].value}."

    def ask(self, n: int) -> str:
        return f"What is {mine(self.bindings[n].attribute)}?"

    def small_talk(self, n: int) -> str:
        return filler(Random(n))[0]

    def knows(self, reply: BaseMessage, n: int, *, changed: bool = False) -> bool:
        return is_correct(reply.text, (self.changed if changed else self.bindings)[n])


ATTRIBUTES = ("favorite color", "favorite food", "home town", "job", "pet", "hobby")


def world(engine: Any) -> World:
    rng = Random(20261)
    bindings = draw_bindings(rng, 6, attributes=ATTRIBUTES)
    return World(engine, bindings, [redraw(rng, binding) for binding in bindings])
