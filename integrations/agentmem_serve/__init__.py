"""agentmem_serve: a model with memory behind an HTTP endpoint that clients of OpenAI's API speak.

`create_app` gives an ASGI application over an engine and a saver; `agentmem serve` runs it. A thread's messages and
memory are in the saver's database and nowhere else, so several processes on one database are equals. It needs the extra
`serve`. See docs/howto/serve.md.
"""

from __future__ import annotations

from importlib import import_module

from agentmem.errors import MissingExtraError

try:
    for needed in ("starlette", "uvicorn", "prometheus_client", "sqlalchemy", "langgraph"):
        import_module(needed)
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "starlette", "serve") from error

from agentmem_serve.app import create_app, run
from agentmem_serve.keys import ApiKey, KeyFile
from agentmem_serve.service import ServeSettings

__all__ = ["ApiKey", "KeyFile", "ServeSettings", "create_app", "run"]
