"""`agentmem serve` and `agentmem keys`: the model behind an HTTP endpoint, and who may ask it.

Only the parameters are defined at the top; everything else is imported when a command runs, since the command tree
imports this module.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from agentmem.text import printable
from agentmem_cli.govern import Encrypted, Prefix, ReceiptKey, Schema
from agentmem_cli.govern import KeyFile as HmacKeyFile
from agentmem_cli.options import (
    Adapter,
    Db,
    Device,
    Dtype,
    Facts,
    Loading,
    MaxTokens,
    Model,
    Quantize,
    Temperature,
    WindowText,
    window_of,
)

keys = typer.Typer(help="The API keys of `agentmem serve`, in a file that holds no key.", no_args_is_help=True)

Keys = Annotated[Path, typer.Argument(metavar="FILE", help="The file; `agentmem serve --keys` reads it.")]
_LOCAL = ("127.0.0.1", "localhost", "::1")


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
    keys: Annotated[
        Path | None, typer.Option(help="API keys, see `agentmem keys`: each sees its subject's threads alone.")
    ] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Let everybody who reaches --host see every thread.")
    ] = False,
    max_turns: Annotated[int, typer.Option(min=1, help="Turns that run or wait at once; more are told 429.")] = 128,
    rate: Annotated[
        int | None, typer.Option(min=1, help="Requests a minute of each subject; more are told 429.")
    ] = None,
    facts: Facts = None,
    receipt_key_file: ReceiptKey = None,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    encrypted: Encrypted = False,
    hmac_key_file: HmacKeyFile = None,
) -> None:
    """Serve the model to clients of OpenAI's API. Several processes may share a database.

    Requests that say nothing else get --temperature and --max-tokens; more than --max-tokens is refused.
    """
    from agentmem.errors import ConfigError
    from agentmem_cli.storage import Place, read_key
    from agentmem_serve import KeyFile, ServeSettings, create_app, run
    from agentmem_sql.saver import CACHE_BYTES

    if keys is None and not no_keys and host not in _LOCAL:
        raise ConfigError(f"expected --keys FILE, since others reach {host}, found none; make keys, or pass --no-keys")
    key_file = receipt_key_file or hmac_key_file
    receipt_key = None if key_file is None else read_key(key_file)
    known = None if keys is None else KeyFile(keys)
    place = Place(db, prefix, schema, encrypted, hmac_key_file)
    with ExitStack() as stack:
        saver = stack.enter_context(place.open(make=True, cache_bytes=CACHE_BYTES))
        saver.setup()  # a mistake is reported before the model is loaded
        store = None
        if facts is not None:
            from agentmem_cli.graph import open_facts

            store = stack.enter_context(open_facts(facts))
        engine = stack.enter_context(Loading(model, adapter, device, dtype, quantize).load())
        settings = ServeSettings(
            window=window_of(window, engine.name),
            max_tokens=max_tokens,
            temperature=temperature,
            timeout=timeout,
            max_turns=max_turns,
            requests_per_minute=rate,
        )
        app = create_app(engine, saver, settings, keys=known, receipt_key=receipt_key, facts=store)
        run(app, host=host, port=port, grace=grace)


@keys.command("add")
def add_key(file: Keys, subject: Annotated[str, typer.Option(help="Whose threads it opens.")]) -> None:
    """Make a key and print it; it cannot be had again."""
    from agentmem_serve import KeyFile

    typer.echo(KeyFile(file).add(subject))


@keys.command("list")
def list_keys(file: Keys) -> None:
    """List the keys: id, subject, and when each was made."""
    from agentmem_serve import KeyFile

    for key in KeyFile(file).listed():
        typer.echo(printable(f"{key.id}  {key.created}  {key.subject}"))


@keys.command("revoke")
def revoke_key(file: Keys, name: Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")]) -> None:
    """Remove a key; servers that run refuse it at once."""
    from agentmem_serve import KeyFile

    typer.echo(printable(f"revoked a key of {KeyFile(file).revoke(name).subject}"))
