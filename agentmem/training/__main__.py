"""`python -m agentmem.training`: what `agentmem train` does, in a form that `accelerate launch -m` can start."""

from __future__ import annotations

import sys

import typer

from agentmem.errors import AgentMemError
from agentmem.text import printable
from agentmem.training.command import train_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(train_command)

if __name__ == "__main__":
    try:
        app()
    except AgentMemError as error:
        sys.stderr.write(f"{type(error).__name__}: {printable(' '.join(str(error).split()))}\n")
        sys.exit(3)
