"""agentmem_inspect: a page in the browser that shows what threads hold and what their memories have taken up.

It stands on `agentmem_governance` and runs on this machine only: `agentmem inspect` opens it. It needs the extra
`inspect` (Starlette and uvicorn); an engine is needed only to put questions to a memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.lazy import lazy_names

_HOMES = {"make_app": "agentmem_inspect.app", "serve": "agentmem_inspect.app"}
_NEEDS = {
    "starlette": ("starlette", "inspect"),
    "uvicorn": ("uvicorn", "inspect"),
    "sqlalchemy": ("sqlalchemy", "sql"),
    "langgraph": ("langgraph-checkpoint", "sql"),
}

__all__ = ["make_app", "serve"]

if TYPE_CHECKING:
    from agentmem_inspect.app import make_app, serve

__getattr__, __dir__ = lazy_names(__name__, _HOMES, _NEEDS)
