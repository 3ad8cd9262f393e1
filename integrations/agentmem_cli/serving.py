"""`agentmem serve`: the model behind an HTTP endpoint.

Only the parameters are defined at the top; everything else is imported when a command runs, since the command tree
imports this module.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from agentmem_cli.govern import Encrypted, KeyFile, Prefix, Schema
from agentmem_cli.options import (
    Adapter,
    Db,
    Device,
    Dtype,
    Loading,
    MaxTokens,
    Model,
    Quantize,
    Temperature,
    WindowText,
    window_of,
)


def serve(
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    db: Db = "agentmem-serve.db",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    window: WindowText = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that a turn may take, waiting included.")] = 300.0,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds that turns under way have to finish after SIGTERM.")
    ] = 30.0,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    encrypted: Encrypted = False,
    hmac_key_file: KeyFile = None,
) -> None:
    """Serve the model to clients of OpenAI's API. Several processes may share a database.

    Requests that say nothing else get --temperature and --max-tokens; more than --max-tokens is refused.
    """
    from agentmem_cli.storage import Place
    from agentmem_serve import ServeSettings, create_app, run
    from agentmem_sql.saver import CACHE_BYTES

    place = Place(db, prefix, schema, encrypted, hmac_key_file)
    with ExitStack() as stack:
        saver = stack.enter_context(place.open(make=True, cache_bytes=CACHE_BYTES))
        saver.setup()  # a mistake is reported before the model is loaded
        engine = stack.enter_context(Loading(model, adapter, device, dtype, quantize).load())
        settings = ServeSettings(
            window=window_of(window, engine.name), max_tokens=max_tokens, temperature=temperature, timeout=timeout
        )
        run(create_app(engine, saver, settings), host=host, port=port, grace=grace)
