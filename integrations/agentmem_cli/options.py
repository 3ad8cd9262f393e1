"""Options that several commands share, each defined once, and their parsed values."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agentmem.errors import ConfigError

if TYPE_CHECKING:
    from agentmem import Engine, Window

Quantization = Literal["4bit", "8bit"]

Model = Annotated[str, typer.Option("--model", help='"nano", "smollm2", a directory, or a hub id.')]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter", help='A directory, hub id, or published one; "none": the bare model; left out: the model\'s own.'
    ),
]
Device = Annotated[
    str, typer.Option("--device", help='"cuda", "cuda:1", "mps", "cpu"; "auto" takes the first there is.')
]
Dtype = Annotated[str, typer.Option("--dtype", help='"float32", "bfloat16" ...; "auto" is float32 on a CPU.')]
Quantize = Annotated[Quantization | None, typer.Option("--quantize", help="Load the weights in 4 or 8 bits.")]
Db = Annotated[str, typer.Option("--db", help="What keeps the threads: a SQLite file, or a database's URL.")]
Facts = Annotated[
    str | None, typer.Option("--facts", help="The exact facts: a directory, or a Chroma server's http://HOST:PORT.")
]
WindowText = Annotated[
    str | None,
    typer.Option(
        "--window",
        help='What of the thread a prompt shows: "4096" the last tokens, "2m" the last messages. '
        "Left out: the last message for nano and smollm2, which shows their memory, else 4096.",
    ),
]
System = Annotated[str, typer.Option("--system", help="A system prompt, shown in every turn and never stored.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of a reply.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


SHIPPED = ("nano", "smollm2")
"""Models whose adapters were trained on messages that are read alone."""


@dataclass(frozen=True)
class Loading:
    """Which model is loaded, and how."""

    model: str = "nano"
    adapter: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: Quantization | None = None

    def load(self) -> Engine:
        """Load it; see `agentmem.load` for the errors."""
        import agentmem

        adapter: str | Literal[False] | None = False if self.adapter == "none" else self.adapter
        return agentmem.load(self.model, adapter, self.device, self.dtype, quantize=self.quantize)

    def arguments(self) -> str:
        """Command-line options that load the same model."""
        given = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return "".join(f" --{f.name} {shlex.quote(getattr(self, f.name))}" for f in given)


def window_of(text: str | None, model: str) -> Window:
    """The window that `--window` names for a model; left out, the last message for those that were trained on that.

    Raises:
        ConfigError: the text is no window.
    """
    from agentmem import Window

    if text is not None:
        return parse_window(text)
    return Window(messages=1) if model in SHIPPED else Window()  # besides, a short window shows that they remember


def parse_window(text: str) -> Window:
    """ "4096", "4096t" or "4096 tokens": the last tokens; "2m" or "2 messages": the last messages.

    Raises:
        ConfigError: the text is neither.
    """
    from agentmem import Window

    match = re.fullmatch(r"(\d+)\s*(t|tokens?|m|messages?)?", text.strip())
    if match is None:
        raise ConfigError(f'a window is a number of tokens ("4096") or of messages ("2m"); found {text!r}')
    number = int(match[1])
    return Window(messages=number) if (match[2] or "").startswith("m") else Window(tokens=number)
