"""agentmem: working memory for LangGraph agents on a local model.

The names below load on first use, so that importing a light part (``agentmem.state``, ``agentmem.errors``,
``agentmem_sql``) pulls in no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "agentmem.adapter",
    "AsyncTurnStream": "agentmem.engine",
    "ConsumedRecord": "agentmem.record",
    "Delta": "agentmem.replies",
    "Engine": "agentmem.engine",
    "InvalidToolCall": "agentmem.replies",
    "MemoryConfig": "agentmem.config",
    "MemoryState": "agentmem.state",
    "Message": "agentmem.messages",
    "Remembered": "agentmem.turn",
    "ReplyFormat": "agentmem.formats",
    "Sampling": "agentmem.sampling",
    "SteeredModel": "agentmem.steered",
    "SteeredOutput": "agentmem.steered",
    "ToolCall": "agentmem.messages",
    "Turn": "agentmem.turn",
    "TurnOptions": "agentmem.engine",
    "TurnStream": "agentmem.engine",
    "Usage": "agentmem.turn",
    "Window": "agentmem.window",
    "context_limit": "agentmem.loading",
    "load": "agentmem.loading",
    "load_adapter": "agentmem.adapter",
    "save_adapter": "agentmem.adapter",
}

__all__ = [
    "Adapter",
    "AsyncTurnStream",
    "ConsumedRecord",
    "Delta",
    "Engine",
    "InvalidToolCall",
    "MemoryConfig",
    "MemoryState",
    "Message",
    "Remembered",
    "ReplyFormat",
    "Sampling",
    "SteeredModel",
    "SteeredOutput",
    "ToolCall",
    "Turn",
    "TurnOptions",
    "TurnStream",
    "Usage",
    "Window",
    "__version__",
    "context_limit",
    "load",
    "load_adapter",
    "save_adapter",
]

if TYPE_CHECKING:
    from agentmem.adapter import Adapter, load_adapter, save_adapter
    from agentmem.config import MemoryConfig
    from agentmem.engine import AsyncTurnStream, Engine, TurnOptions, TurnStream
    from agentmem.formats import ReplyFormat
    from agentmem.loading import context_limit, load
    from agentmem.messages import Message, ToolCall
    from agentmem.record import ConsumedRecord
    from agentmem.replies import Delta, InvalidToolCall
    from agentmem.sampling import Sampling
    from agentmem.state import MemoryState
    from agentmem.steered import SteeredModel, SteeredOutput
    from agentmem.turn import Remembered, Turn, Usage
    from agentmem.window import Window


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'agentmem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
