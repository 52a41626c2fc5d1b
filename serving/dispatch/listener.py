"""The router's side of the connections that replicas report over."""

import asyncio
import contextlib
import logging

from serving.dispatch.dispatcher import Dispatcher
from serving.dispatch.messages import Hello, decode
from serving.lines import MAX_LINE_BYTES

logger = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0


class Listener:
    """Reads replicas' messages into the dispatcher. A connection that says nonsense is closed."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._server: asyncio.Server | None = None
        self._connections: dict[str, asyncio.StreamWriter] = {}

    async def start(self, host: str) -> str:
        """Listen on a free port of `host`; returns host:port."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=MAX_LINE_BYTES)
        port = self._server.sockets[0].getsockname()[1]
        return f"{host}:{port}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._connections.values()):
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replica_id = None
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                hello = decode(await reader.readline())
            if not isinstance(hello, Hello):
                raise ValueError("a connection begins with Hello")
            replica_id = hello.replica_id
            self._connections[replica_id] = writer
            self._dispatcher.connected(hello)
            while line := await reader.readline():
                self._dispatcher.receive(replica_id, decode(line))
        except (ValueError, OSError) as error:
            logger.warning("connection of replica %s: %s", replica_id, error)
        finally:
            # A replica that connected anew is not gone because its older connection is.
            if replica_id is not None and self._connections.get(replica_id) is writer:
                del self._connections[replica_id]
                self._dispatcher.disconnected(replica_id)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
