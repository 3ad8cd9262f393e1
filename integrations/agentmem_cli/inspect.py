"""`agentmem inspect`: a page in the browser over a database of threads."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from agentmem_cli.govern import Actor, Encrypted, KeyFile, Prefix, ReceiptKey, Schema, open_governor
from agentmem_cli.options import Adapter, Db, Device, Dtype, Facts, Loading, Quantize


def inspect(
    db: Db = "agentmem-chat.db",
    facts: Facts = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Answers questions from memories, and writes them anew.")
    ] = None,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; left out, one that is free.")] = 0,
    actor: Actor = None,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    encrypted: Encrypted = False,
    hmac_key_file: KeyFile = None,
    receipt_key_file: ReceiptKey = None,
) -> None:
    """Look into threads and their memories on a page in the browser, for this machine only.

    Open the address that is printed; Ctrl-C ends the page. Whoever opens a thread is noted in the audit trail.
    """
    from agentmem_inspect import serve

    with ExitStack() as stack:
        engines = []
        if model is not None:
            engines.append(stack.enter_context(Loading(model, adapter, device, dtype, quantize).load()))
        opened = open_governor(db, facts, prefix, schema, encrypted, hmac_key_file, receipt_key_file, actor, engines)
        governor = stack.enter_context(opened)
        serve(governor, engine=engines[0] if engines else None, port=port, on_ready=_say)


def _say(address: str) -> None:
    typer.echo(f"{address}\nCtrl-C ends it.")
