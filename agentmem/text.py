"""Text that comes from elsewhere: read as JSON, and shown on a terminal.

Files, replies, facts, thread names and error messages may hold anything: JSON nested so deep that its reader gives up,
or control characters that move the cursor, change the clipboard or rewrite earlier output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

# Control characters except line feed and tab, those that change the direction of text, and half surrogate pairs, which
# cannot be written.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def parse_json(text: str | bytes, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """The value that JSON text states. `parse_constant` is called for NaN and the infinities, as in `json.loads`.

    Raises:
        ValueError: it is no JSON, is not valid UTF-8, or is nested deeper than Python's own recursion goes.
    """
    try:
        return json.loads(text, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError("expected JSON of a usual depth, found too many arrays or objects inside each other") from None


def printable(text: str, *, lines: bool = True) -> str:
    """The text with its control characters escaped, for a terminal: ESC becomes `\\x1b`.

    Line feeds and tabs stay as they are. With `lines=False`, for names, they are escaped as well, and so is whatever
    else cannot be seen, but for spaces.
    """
    if not lines:
        return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
