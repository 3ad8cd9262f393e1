"""agentmem_inspect: a page in the browser that shows what threads hold and what their memories have taken up.

It stands on `agentmem_governance` and runs on this machine only: `agentmem inspect` opens it. It needs the extra
`inspect` (Starlette and uvicorn); an engine is needed only to put questions to a memory.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentmem.errors import MissingExtraError

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'agentmem_inspect' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _NEEDS:
            raise
        raise MissingExtraError(*_NEEDS[package]) from error


def __dir__() -> list[str]:
    return sorted(__all__)
