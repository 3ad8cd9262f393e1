"""agentmem: working memory for LangGraph agents on a local model.

The names below load on first use, so that importing a light part (`agentmem.state`, `agentmem.errors`,
`agentmem_sql`) pulls in no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.lazy import lazy_names

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "agentmem.delta.adapter",
    "AsyncTurnStream": "agentmem.engine",
    "ConsumedRecord": "agentmem.record",
    "Delta": "agentmem.generation.output_parser",
    "Engine": "agentmem.engine",
    "InvalidToolCall": "agentmem.generation.output_parser",
    "MemoryConfig": "agentmem.delta.config",
    "MemoryState": "agentmem.state",
    "Message": "agentmem.messages",
    "Remembered": "agentmem.generation.turn",
    "ReplyFormat": "agentmem.generation.reply_format",
    "Sampling": "agentmem.generation.sampling",
    "SteeredModel": "agentmem.delta.model",
    "SteeredOutput": "agentmem.delta.model",
    "ToolCall": "agentmem.messages",
    "Truncation": "agentmem.generation.plan",
    "Turn": "agentmem.generation.turn",
    "TurnOptions": "agentmem.generation.plan",
    "TurnStream": "agentmem.engine",
    "Usage": "agentmem.generation.turn",
    "Window": "agentmem.prompt.transcript",
    "context_limit": "agentmem.loading",
    "load": "agentmem.loading",
    "load_adapter": "agentmem.delta.adapter",
    "save_adapter": "agentmem.delta.adapter",
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
    "Truncation",
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
    from agentmem.delta.adapter import Adapter, load_adapter, save_adapter
    from agentmem.delta.config import MemoryConfig
    from agentmem.delta.model import SteeredModel, SteeredOutput
    from agentmem.engine import AsyncTurnStream, Engine, TurnStream
    from agentmem.generation.output_parser import Delta, InvalidToolCall
    from agentmem.generation.plan import Truncation, TurnOptions
    from agentmem.generation.reply_format import ReplyFormat
    from agentmem.generation.sampling import Sampling
    from agentmem.generation.turn import Remembered, Turn, Usage
    from agentmem.loading import context_limit, load
    from agentmem.messages import Message, ToolCall
    from agentmem.prompt.transcript import Window
    from agentmem.record import ConsumedRecord
    from agentmem.state import MemoryState

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
