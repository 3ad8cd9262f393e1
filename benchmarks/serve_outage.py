"""A way to a database's server that can be cut and mended, for `serve_load.py`."""

from __future__ import annotations

import asyncio

from sqlalchemy import make_url

_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}


class Cable:
    """Carries connections to a database's server, through a port of this process.

    Args:
        url: of the database.
    """

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        name = self._url.get_backend_name()
        self._host, self._server_port = self._url.host or "127.0.0.1", self._url.port or _PORTS[name]
        self._port = 0
        self._listening: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()

    async def open(self) -> str:
        """Take connections; gives the URL of the database by this way, the same each time."""
        self._listening = await asyncio.start_server(self._carry, "127.0.0.1", self._port)
        self._port = self._listening.sockets[0].getsockname()[1]
        through = self._url.set(host="127.0.0.1", port=self._port)
        return through.render_as_string(hide_password=False)

    def cut(self) -> None:
        """End all connections, without a word, and take no new ones."""
        assert self._listening is not None
        self._listening.close()
        for end in self._ends:
            end.transport.abort()

    async def close(self) -> None:
        """Cut it, and wait until that is done."""
        self.cut()
        while self._ends:
            await asyncio.sleep(0.01)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection(self._host, self._server_port)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, to_server}
        self._ends |= ends
        try:
            await asyncio.gather(_pump(reader, to_server), _pump(from_server, writer))
        finally:
            self._ends -= ends
            for end in ends:
                end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # it was cut
    finally:
        writer.close()
