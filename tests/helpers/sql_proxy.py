"""A proxy before a database server that cuts a connection at a chosen message.

To the driver and the server it is a network that fails.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Forwards connections to a server.

    A message is what a client sends before it waits for an answer. They are counted from 0 over all connections.

    Attributes:
        port: on 127.0.0.1.
        messages: how many there were.
        cut_at: the message at which its connection is cut, once; None for none.
        after: whether the server still gets that message, and only its answer is lost.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self.messages = 0
        self.cut_at: int | None = None
        self.after = False
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Stop listening, and wait until both ends have closed every connection."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._forward, args=(client,)))
                self._threads[-1].start()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server, suppress(OSError):
            asking = cutting = False
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(2**16)
                    if source is client and not asking:
                        cutting = self.messages == self.cut_at
                        self.messages += 1
                    asking = source is client
                    if not data or (cutting and (source is server or not self.after)):
                        self.cut_at = None if cutting else self.cut_at
                        return
                    (server if asking else client).sendall(data)


@contextmanager
def proxy(server: tuple[str, int]) -> Iterator[Proxy]:
    """A proxy before the server at this address; close what is connected before it ends."""
    opened = Proxy(server)
    try:
        yield opened
    finally:
        opened.close()
