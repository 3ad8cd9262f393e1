"""Threads for the page of `agentmem inspect`, made without a model: memories whose matrices are chosen by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from starlette.applications import Starlette
from starlette.testclient import TestClient

from agentmem import ConsumedRecord, MemoryState
from agentmem_langgraph.messages import to_engine
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, put

SHAPE = (2, 1, 4, 4)  # layers, heads, rank, rank
HOST = "127.0.0.1:8000"
TOKEN = "a token of the tests"


def state_of(messages: Sequence[BaseMessage]) -> MemoryState:
    """A memory that consumed these messages: its first layer has as many ones, its second stays zero."""
    matrices = np.zeros(SHAPE, dtype=np.float32)
    matrices[0].flat[: len(messages)] = 1
    record = ConsumedRecord.empty().align(to_engine(messages)).record
    return MemoryState.from_matrices(matrices, record, model_fingerprint="model", adapter_fingerprint="adapter")


def turns(
    saver: SQLAlchemySaver, thread: str, *texts: str, at: RunnableConfig | None = None, **metadata: Any
) -> list[RunnableConfig]:
    """Two checkpoints a text: what was said, and the reply "ok TEXT" with the memory that consumed both."""
    before = None if at is None else saver.get_tuple(at)
    said: list[BaseMessage] = [] if before is None else list(before.checkpoint["channel_values"]["messages"])
    values: dict[str, Any] = {} if before is None else dict(before.checkpoint["channel_values"])
    made, to = [], at or config(thread)
    for text in texts:
        for message in (HumanMessage(text, id=f"{text}-asked"), AIMessage(f"ok {text}", id=f"{text}-reply")):
            said.append(message)
            values = {**values, "messages": list(said)}
            if message.type == "ai":
                values["memory"] = state_of(said).to_dict()
            to = put(saver, to, values, **{"step": len(said), "source": "loop", **metadata})
        made.append(to)
    return made


class Browser(TestClient):
    """Requests to the page, from one who has opened the printed address."""

    def __init__(self, app: Starlette, *, opened: bool = True) -> None:
        super().__init__(app, base_url=f"http://{HOST}")
        if opened:
            assert self.get(f"/?token={TOKEN}").status_code == 200

    def read(self, address: str, status: int = 200) -> str:
        """The text of a page."""
        found = self.get(address)
        assert found.status_code == status, found.text
        return found.text

    def csrf(self) -> str:
        """The hidden value of the page's forms."""
        found = re.search(r'name="csrf" content="([^"]+)"', self.read("/"))
        assert found is not None
        return found[1]

    def submit(self, address: str, status: int = 200, /, **fields: str) -> str:
        """Send a form of the page; gives the page that follows."""
        found = self.post(address, data={"csrf": self.csrf(), **fields})
        assert found.status_code == status, found.text
        return found.text
