"""A connection that is kept from one call to the next, beside the pool.

Taking a connection from SQLAlchemy's pool and giving it back takes longer than many a statement runs. A graph mostly
calls its saver from one thread at a time, and so mostly finds the connection that it used last. All others come from
the pool and go back to it, so that nobody waits for a connection that is kept here.
"""

from __future__ import annotations

from sqlalchemy import Connection


class Idle:
    """The connection that was last used, if nobody uses it. Thread-safe without a lock: every step is one of a list's.

    Attributes:
        round: counts up whenever connections may have gone bad. Who took one in an earlier round gives it to the pool.
    """

    def __init__(self) -> None:
        self.round = 0
        self._closed = False
        self._kept: list[Connection] = []  # one, or now and then as many as came at the same moment

    def take(self) -> Connection | None:
        """The connection, which is then the caller's; None if there is none."""
        try:
            return self._kept.pop()
        except IndexError:
            return None

    def keep(self, connection: Connection, since: int) -> None:
        """Keep a connection that was taken in the round ``since``, or give it to the pool."""
        # The pool ends what SQLAlchemy takes for a transaction, and the options of the one who used it.
        used = connection.in_transaction() or (
            connection.get_execution_options() is not connection.engine.get_execution_options()
        )
        if used or self._kept or self._closed or since != self.round:
            connection.close()
            return
        self._kept.append(connection)
        if self._closed or since != self.round:  # by now
            self.release()

    def release(self) -> None:
        """Give what is kept to the pool, and what is in use too when it comes back."""
        self.round += 1
        while (connection := self.take()) is not None:
            connection.close()

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed = True
        self.release()
