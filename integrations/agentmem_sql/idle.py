"""A connection that is kept from one call to the next, beside the pool.

Taking a connection from SQLAlchemy's pool and giving it back takes longer than many a statement runs. A graph mostly
calls its saver from one thread at a time, and so mostly finds the connection that it used last. All others come from
the pool and go back to it, so that nobody waits for a connection that is kept here.
"""

from __future__ import annotations

from sqlalchemy import Connection


class Idle:
    """The connection that was last used, kept while nobody is at work. Thread-safe without a lock: what is counted and
    what is kept are lists, of which every step is one.

    Attributes:
        round: another object whenever connections may have gone bad. Who took one in an earlier round gives it to the
            pool.
    """

    def __init__(self) -> None:
        self.round = object()
        self._closed = False
        self._users: list[None] = []
        self._kept: list[Connection] = []  # one, or now and then as many as came at the same moment

    def enter(self) -> None:
        """Somebody begins to work, and may have to wait for a connection; `leave` follows in any case."""
        self._users.append(None)

    def leave(self) -> None:
        """Somebody has ended, connection and all."""
        self._users.pop()

    def take(self) -> Connection | None:
        """The connection, which is then the caller's; None if there is none."""
        try:
            return self._kept.pop()
        except IndexError:
            return None

    def keep(self, connection: Connection, since: object) -> None:
        """Keep a connection that was taken in the round ``since``, or give it to the pool."""
        # The pool ends what SQLAlchemy takes for a transaction, and the options of the one who used it.
        used = connection.in_transaction() or (
            connection.get_execution_options() is not connection.engine.get_execution_options()
        )
        if used or self._kept or not self._may_keep(since):
            connection.close()
            return
        self._kept.append(connection)
        # Whoever came after the question looks for a kept one first; whoever came before it waits for the pool's.
        if not self._may_keep(since):
            self.release()

    def release(self) -> None:
        """Give what is kept to the pool, and what is in use too when it comes back."""
        self.round = object()
        while (connection := self.take()) is not None:
            connection.close()

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed = True
        self.release()

    def _may_keep(self, since: object) -> bool:
        """Others at work may be waiting for a connection, and the pool wakes them only when one comes back to it."""
        return len(self._users) <= 1 and not self._closed and since is self.round
