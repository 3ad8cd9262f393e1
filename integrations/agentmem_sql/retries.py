"""Which failed work is run again, and when.

Works may be run again as a whole: each is one transaction, and what they store is keyed by its content. So a write
that lost against other transactions is, after a pause, and whatever met a connection that had been closed is, once,
at once: the pool has dropped that connection and all that are as old. A statement whose prepared form is out of date
is run on another connection until one prepares it anew.
"""

from __future__ import annotations

import random
import time

from sqlalchemy.exc import DBAPIError

from agentmem_sql import faults

# Beyond this nobody waits for a turn that may not come: a lock timeout may have taken most of it, in seconds.
_BUDGET = 20.0
_RETRIES = 6
_FIRST_PAUSE = 0.01
# Every connection of a pool may have prepared the same statement.
_MOST_UNPREPARED = 32


class Retries:
    """What becomes of one call."""

    def __init__(self, began: float) -> None:
        """``began``: when the call did, on the monotonic clock."""
        self._lost = 0
        self._reconnected = False
        self._unprepared = 0
        self._began = began

    def pause(self, error: DBAPIError) -> float | None:
        """The seconds to wait before the work is run again; None where it is not."""
        if error.connection_invalidated:
            again, self._reconnected = not self._reconnected, True
            return 0.0 if again else None
        if faults.is_unprepared(error) and self._unprepared < _MOST_UNPREPARED:
            self._unprepared += 1
            return 0.0
        if not faults.is_transient(error) or self._lost >= _RETRIES or time.monotonic() - self._began > _BUDGET:
            return None
        self._lost += 1
        return _FIRST_PAUSE * float(2**self._lost) * random.uniform(0.5, 1.0)
