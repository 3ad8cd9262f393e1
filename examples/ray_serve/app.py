"""Replicas with an engine each, to which Ray Serve gives the requests of a thread by the thread's id.

    RAY_SERVE_SESSION_ID_HEADER_KEY=x-thread-id serve run ray_serve.app:app database=postgresql://localhost/threads

What a replica answers is what `agentmem serve` answers. Nothing of a thread is in a replica but caches, so that
replicas may come, go and be killed.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from starlette.applications import Starlette

import agentmem
from agentmem import Window
from agentmem_serve import ServeSettings, create_app
from agentmem_sql import SQLAlchemySaver

MOST_TURNS = 32
"""Turns that run or wait in a replica; what does not fit is sent to another one, or waits in the proxy."""


class Replica:
    """A model, and the endpoint over it.

    Args:
        database: the URL of the database that all replicas share.
        model: as for `agentmem.load`.
        settings: of the endpoint; by default nano's window is one message, to show that it remembers.
    """

    def __init__(self, database: str, model: str = "nano", settings: ServeSettings | None = None) -> None:
        self._saver = SQLAlchemySaver.from_url(database)
        self._saver.setup()
        self._engine = agentmem.load(model)
        usual = ServeSettings(window=Window(messages=1) if model == "nano" else None, max_turns=MOST_TURNS)
        self._app = create_app(self._engine, self._saver, settings or usual)

    def __serve_build_asgi_app__(self) -> Starlette:
        """What answers the requests."""
        return self._app

    def __del__(self) -> None:
        """Ray calls this when a replica ends and its requests are answered."""
        self._engine.close()
        self._saver.close()


deployment: Any = serve.deployment(
    serve.ingress()(Replica),
    # By the thread's id on a ring of hashes: when a replica comes or goes, only its share of the threads moves.
    request_router_config=RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
    ),
    max_ongoing_requests=MOST_TURNS,
    # What would wait in the proxy beyond this is told to come again.
    max_queued_requests=4 * MOST_TURNS,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
    # A second replica as soon as the first one's turns wait for each other; back when it has been quiet for a while,
    # since a replica that ends takes the KV of its threads along.
    autoscaling_config=AutoscalingConfig(
        min_replicas=1, max_replicas=4, target_ongoing_requests=8, upscale_delay_s=10, downscale_delay_s=600
    ),
    graceful_shutdown_timeout_s=60,
    ray_actor_options={"num_cpus": 1},  # {"num_gpus": 1} for a model on a GPU
)


def app(arguments: dict[str, Any]) -> Application:
    """What `serve run` starts: `database=`, `model=`, and `replicas=` for a fixed number of them."""
    fixed = arguments.pop("replicas", None)
    replicas = deployment if fixed is None else deployment.options(num_replicas=int(fixed), autoscaling_config=None)
    return replicas.bind(**arguments)
