"""Safe terminal output: errors as one line each, and control characters made visible.

Replies, facts, thread names and error messages come from elsewhere. An escape sequence in them could move the cursor,
change the clipboard or rewrite earlier output. So control characters are shown as text and not sent.
"""

from __future__ import annotations

import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from agentmem.errors import AgentMemError
from agentmem.text import printable


def error_line(error: BaseException) -> Text:
    """An error as one red line."""
    return Text.assemble((type(error).__name__, "bold red"), (f": {printable(' '.join(str(error).split()))}", "red"))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process when an error gets this far.

    An `AgentMemError` becomes one red line and exit code 3; any other error is a bug of ours and becomes a traceback
    and 1.
    """
    try:
        yield
    except AgentMemError as error:
        Console(stderr=True).print(error_line(error), soft_wrap=True)
        sys.exit(3)
    except Exception:  # noqa: BLE001 - shown in full
        sys.stderr.write(printable(traceback.format_exc()))
        sys.exit(1)


def hide_library_warnings() -> None:
    """Keep libraries' warnings for programmers out of replies; `python -W` and PYTHONWARNINGS still show them."""
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)


def command() -> str:
    """How the user can run this command: its name if the shell finds it, else its path."""
    program = Path(sys.argv[0])
    if program.name != "agentmem":
        program = Path(sys.executable).with_name("agentmem")
    installed = shutil.which("agentmem")
    # Links are not resolved: the programs in a bin folder may all be links to one interpreter.
    if installed is not None and Path(installed).absolute() == program.absolute():
        return "agentmem"
    try:
        return str(program.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(program.absolute())
