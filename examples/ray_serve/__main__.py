"""A Ray of this machine alone, with the replicas of `ray_serve.app` behind one port.

python -m ray_serve --db postgresql://localhost/threads --replicas 2
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

# Read by every process of Ray, so set before any of them is started.
os.environ["RAY_SERVE_SESSION_ID_HEADER_KEY"] = "x-thread-id"


def main(
    db: Annotated[str, typer.Option(help="The database that all replicas share.")],
    model: Annotated[str, typer.Option(help="The model.")] = "nano",
    replicas: Annotated[int | None, typer.Option(min=1, help="How many; left out, as many as it takes.")] = None,
    port: Annotated[int, typer.Option(help="The port, on this machine only.")] = 8000,
) -> None:
    """Serve until interrupted."""
    import ray
    from ray import serve

    from ray_serve.app import app

    # A replica asks for a processor; the machine may have fewer than there are replicas.
    ray.init(include_dashboard=False, num_cpus=max(os.cpu_count() or 1, (replicas or 1) + 1))
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {"database": db, "model": model, **({} if replicas is None else {"replicas": replicas})}
    serve.run(app(arguments), blocking=True)


if __name__ == "__main__":
    typer.run(main)
