"""A TCP proxy in front of the server, whose connections can be cut or held."""

import asyncio
import contextlib
import threading


class Proxy:
    """Forwards a port on loopback to another one, in a thread of its own.

    Args:
        target: the server's port.

    Attributes:
        port: where clients connect.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()
        started = threading.Event()
        threading.Thread(target=self._run, args=(started,), name="proxy", daemon=True).start()
        started.wait()

    def cut(self) -> int:
        """Close every connection; return how many there were."""
        return asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    def hold(self) -> None:
        """Stop forwarding, without closing anything, until `release`."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def release(self) -> None:
        """Go on forwarding."""
        self._loop.call_soon_threadsafe(self._open.set)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0, limit=2**22))
        self.port = int(server.sockets[0].getsockname()[1])
        started.set()
        self._loop.run_forever()

    async def _cut(self) -> int:
        cut = len(self._writers)
        for writer in list(self._writers):
            writer.transport.abort()
        return cut

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self._target, limit=2**22)
        except OSError:  # the server is away, and so is its proxy
            writer.transport.abort()
            return
        self._writers |= {writer, there[1]}
        with contextlib.suppress(OSError):
            await asyncio.gather(self._forward(reader, there[1]), self._forward(there[0], writer))
        self._writers -= {writer, there[1]}

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while part := await reader.read(2**20):
                await self._open.wait()
                writer.write(part)
                await writer.drain()
        finally:
            writer.close()
