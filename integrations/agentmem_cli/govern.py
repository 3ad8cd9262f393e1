"""`agentmem subjects`, `forget`, `verify`, `audit`, `export` and `import`: what belongs to whom, and how it goes.

Only the parameters are defined at the top; everything else is imported when a command runs, since the command tree
imports this module.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentmem.text import printable
from agentmem_cli.options import Adapter, AsJson, Db, Device, Dtype, Facts, Loading, Quantize

if TYPE_CHECKING:
    from agentmem_governance import Governor, Receipt

_DB = "agentmem-chat.db"

Prefix = Annotated[str, typer.Option(help="What the names of the tables begin with.")]
Schema = Annotated[str | None, typer.Option(help="Of the tables; left out, the connection's own.")]
Encrypted = Annotated[bool, typer.Option("--encrypted", help="With AES, by the key in LANGGRAPH_AES_KEY.")]
KeyFile = Annotated[
    Path | None, typer.Option(help="Holds the hmac_key of the database, byte by byte; signs receipts too.")
]
ReceiptKey = Annotated[
    Path | None,
    typer.Option(help="Signs receipts: a secret, byte by byte, or an Ed25519 key as PEM, whose public one checks."),
]
Actor = Annotated[str | None, typer.Option(help="Who acts, for receipts and the audit trail; left out, the user.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
NoRewrite = Annotated[
    bool, typer.Option("--no-rewrite", help="On a server: do not lock the tables to write them anew; see the receipt.")
]


def subjects(
    db: Db = _DB,
    facts: Facts = None,
    as_json: AsJson = False,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    encrypted: Encrypted = False,
    hmac_key_file: KeyFile = None,
) -> None:
    """List who owns threads and facts."""
    from dataclasses import asdict

    from rich import box
    from rich.console import Console
    from rich.table import Table

    with open_governor(db, facts, prefix, schema, encrypted, hmac_key_file) as governor:
        owners = governor.subjects()
    if as_json:
        typer.echo(json.dumps([asdict(owner) for owner in owners], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("subject", overflow="fold")
    table.add_column("threads", justify="right")
    table.add_column("facts", justify="right")
    for owner in owners:
        table.add_row(printable(owner.name), str(len(owner.threads)), str(owner.facts))
    Console().print(table)


def forget(
    subject: Annotated[str | None, typer.Option(help="Whose threads and facts.")] = None,
    thread: Annotated[str | None, typer.Option(help="A thread, or that of the message.")] = None,
    message: Annotated[str | None, typer.Option(help="The id of one message of the thread.")] = None,
    keep_reply: Annotated[bool, typer.Option("--keep-reply", help="The answers to the message stay.")] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Checkpoints that hold the message are rewritten, not removed.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The file of the receipt; left out, receipt-ID.json.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Writes the thread's memory anew.")] = None,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    db: Db = _DB,
    facts: Facts = None,
    actor: Actor = None,
    no_rewrite: NoRewrite = False,
    yes: Yes = False,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    encrypted: Encrypted = False,
    hmac_key_file: KeyFile = None,
    receipt_key_file: ReceiptKey = None,
) -> None:
    """Forget a subject, a thread, or one message, so that nothing of it is left in reach, and write a receipt.

    Deletions that were interrupted are completed first. Stop the processes that use the database and the facts; on a
    server, those that use the subject's threads.
    """
    if (subject is None) == (thread is None) or (message is not None and thread is None):
        raise typer.BadParameter("pass --subject, or --thread with or without --message")
    if keep_checkpoints and message is None:
        raise typer.BadParameter("pass --keep-checkpoints with --message")
    with ExitStack() as stack:
        engines = []
        if model is not None:
            engines.append(stack.enter_context(Loading(model, adapter, device, dtype, quantize).load()))
        opened = open_governor(db, facts, prefix, schema, encrypted, hmac_key_file, receipt_key_file, actor, engines)
        governor = stack.enter_context(opened)
        for receipt in governor.resume(rewrite=not no_rewrite):
            _written(receipt, None)
        if subject is not None:
            owner = next((each for each in governor.subjects() if each.name == subject), None)
            if owner is None:
                typer.echo(f"{subject!r} owns nothing here")
                raise typer.Exit(1)
            what = f"{len(owner.threads)} threads and {owner.facts} facts of {subject!r}"
        else:
            what = f"thread {thread!r}" if message is None else f"message {message!r} of thread {thread!r}"
        if not yes:
            typer.confirm(f"Forget {what}? They cannot be brought back.", abort=True)
        receipt = governor.forget(
            subject,
            thread=thread,
            message=message,
            with_reply=not keep_reply,
            keep_checkpoints=keep_checkpoints,
            rewrite=not no_rewrite,
        )
        _written(receipt, out)


def verify(
    receipt: Annotated[Path, typer.Argument(metavar="RECEIPT", help="The file that `agentmem forget` wrote.")],
    db: Db = _DB,
    facts: Facts = None,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    encrypted: Encrypted = False,
    hmac_key_file: KeyFile = None,
    receipt_key_file: ReceiptKey = None,
    signature_only: Annotated[
        bool, typer.Option("--signature-only", help="Without a database: whether it is signed with the key.")
    ] = False,
) -> None:
    """Check a receipt: its signature, and that nothing of what went is back. Exits with 1 where it does not hold."""
    from agentmem_cli.storage import read_key
    from agentmem_governance import Receipt

    loaded = Receipt.load(receipt)
    if signature_only:
        if (key_file := receipt_key_file or hmac_key_file) is None:
            raise typer.BadParameter("pass --receipt-key-file with --signature-only")
        signed = loaded.is_signed_by(read_key(key_file))
        typer.echo(f"signature: {'valid' if signed else 'absent' if loaded.signature is None else 'invalid'}")
        raise typer.Exit(0 if signed else 1)
    with open_governor(db, facts, prefix, schema, encrypted, hmac_key_file, receipt_key_file) as governor:
        checked = governor.verify(loaded)
    typer.echo(f"signature: {checked.signature}")
    if checked.noted != "absent":
        typer.echo(f"audit trail: {'the same receipt' if checked.noted == 'same' else 'another receipt of this id'}")
    for problem in checked.back:
        typer.echo(printable(problem))
    typer.echo("nothing is back" if not checked.back else f"{len(checked.back)} things are back")
    raise typer.Exit(0 if checked.holds else 1)


def audit(
    thread: Annotated[
        str | None, typer.Option(help="Of this thread; left out, what concerns no single thread.")
    ] = None,
    db: Db = _DB,
    as_json: AsJson = False,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    encrypted: Encrypted = False,
    hmac_key_file: KeyFile = None,
) -> None:
    """Print the audit trail, and whether its chain holds. Exits with 1 where it does not."""

    with open_governor(db, None, prefix, schema, encrypted, hmac_key_file) as governor:
        trail = governor.audit(thread)
    entries = [entry.to_dict() for entry in trail.entries]
    if as_json:
        typer.echo(json.dumps({"entries": entries, "head": trail.head, "problems": trail.problems}, indent=2))
    else:
        for entry in trail.entries:
            details = json.dumps(dict(entry.details), ensure_ascii=False, sort_keys=True)
            line = f"{entry.seq:>5}  {entry.time:%Y-%m-%d %H:%M:%S}  {entry.event:<10} {details}"
            typer.echo(printable(line + ("  (forgotten in part)" if entry.redacted else "")))
        for problem in trail.problems:
            typer.echo(printable(problem))
        typer.echo(f"the chain {'holds' if trail.holds else 'does not hold'}; its head is {trail.head or 'empty'}")
    raise typer.Exit(0 if trail.holds else 1)


def export(
    subject: Annotated[str, typer.Option(help="Whose threads and facts.")],
    out: Annotated[Path, typer.Option(help="The zip file; one of that name is replaced.")],
    db: Db = _DB,
    facts: Facts = None,
    actor: Actor = None,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    encrypted: Encrypted = False,
    hmac_key_file: KeyFile = None,
) -> None:
    """Write everything that belongs to a subject into a file that other programs can read."""
    with open_governor(db, facts, prefix, schema, encrypted, hmac_key_file, actor=actor) as governor:
        done = governor.export(subject, out)
    typer.echo(f"{done.threads} threads with {done.checkpoints} checkpoints and {done.facts} facts are in {out}")


def import_subject(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `agentmem export` wrote.")],
    db: Db = _DB,
    facts: Facts = None,
    actor: Actor = None,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    encrypted: Encrypted = False,
    hmac_key_file: KeyFile = None,
) -> None:
    """Bring an export back, here or elsewhere; what is there already is left alone."""
    with open_governor(db, facts, prefix, schema, encrypted, hmac_key_file, actor=actor, make=True) as governor:
        done = governor.restore(file)
    typer.echo(f"{done.checkpoints} checkpoints of {done.threads} threads and {done.facts} facts were brought back")


@contextmanager
def open_governor(
    db: str,
    facts: str | None,
    prefix: str,
    schema: str | None,
    encrypted: bool,
    hmac_key_file: Path | None,
    receipt_key_file: Path | None = None,
    actor: str | None = None,
    engines: list[Any] | None = None,
    *,
    make: bool = False,
) -> Iterator[Governor]:
    """A governor of existing stores; with `make` they are created if needed."""
    from agentmem.errors import ConfigError
    from agentmem_cli.storage import Place, read_key
    from agentmem_governance import Governor

    if facts is not None and not make and "://" not in facts and not Path(facts).expanduser().is_dir():
        raise ConfigError(
            f"expected the directory of a fact store, or a Chroma server's http://HOST:PORT, found {facts!r}; "
            "correct --facts"
        )
    key_file = receipt_key_file or hmac_key_file
    key = None if key_file is None else read_key(key_file)
    with ExitStack() as stack:
        saver = stack.enter_context(Place(db, prefix, schema, encrypted, hmac_key_file).open(make=make))
        store = None
        if facts is not None:
            from agentmem_cli.graph import open_facts

            store = stack.enter_context(open_facts(facts))
        who = actor or getpass.getuser()
        yield Governor(saver, facts=store, engines=engines or (), actor=who, key=key)


def _written(receipt: Receipt, out: Path | None) -> None:

    path = receipt.save(out or Path(f"receipt-{receipt.id}.json"))
    typer.echo(f"{receipt.checkpoints} checkpoints and {len(receipt.facts)} facts are gone; the receipt is in {path}")
    if receipt.rewritten:
        typer.echo(f"{receipt.rewritten} checkpoints stayed, and were rewritten without the message")
    for place in receipt.not_reached:
        typer.echo(printable(f"  not reached: {place}"))
