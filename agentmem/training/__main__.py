"""`python -m agentmem.training`: what `agentmem train` does, in a form that `accelerate launch -m` can start."""

from __future__ import annotations

import sys

import typer

from agentmem.errors import AgentMemError
from agentmem.training.command import train_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(train_command)

if __name__ == "__main__":
    try:
        app()
    except AgentMemError as error:
        # Lines of data that the message quotes may hold escape sequences, which a terminal would obey.
        said = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in " ".join(str(error).split()))
        sys.stderr.write(f"{type(error).__name__}: {said}\n")
        sys.exit(3)
