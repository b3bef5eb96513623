"""A proxy before PostgreSQL that knows its messages, and does harm at one of them.

    fault = proxy.arm("cut", after_commit)  # the server has committed, and nobody hears of it
    ...
    await fault.wait()

It understands as much of the protocol as it takes to tell the messages apart
(postgresql.org/docs/current/protocol-message-formats.html); encryption it declines.
"""

import asyncio
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, cast

import sqlalchemy as sa

Side = Literal["client", "server"]
Action = Literal["cut", "swallow", "stall", "delay"]

PATIENCE = 30.0
"""Seconds until a fault that is waited for counts as not happening."""

_ENCRYPTION_REQUESTS = (80877103, 80877104)  # SSLRequest, GSSENCRequest


# --------------------------------------------------------------------------------------
# Messages, and places among them
# --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the protocol.

    Attributes:
        sender: Who sends it.

        kind: Its first byte, `b"Q"` for instance; empty for the one that opens a connection.

        data: All of it.
    """

    sender: Side
    kind: bytes
    data: bytes

    @property
    def body(self) -> bytes:
        """What is in it, without its kind and length."""
        return self.data[len(self.kind) + 4 :]

    @property
    def wants_encryption(self) -> bool:
        """Whether it asks for encryption before it opens the connection."""
        return not self.kind and struct.unpack_from("!I", self.body)[0] in _ENCRYPTION_REQUESTS


Place = Callable[[Message], bool]


def before_commit(message: Message) -> bool:
    """COMMIT, before it reaches the server."""
    if message.sender != "client" or message.kind not in {b"Q", b"P"}:
        return False
    # Parse has the name of the prepared statement first, and parameters' types last.
    text = message.body.split(b"\0")[0 if message.kind == b"Q" else 1]
    statements = [each for each in text.upper().replace(b" ", b"").split(b";") if each]
    return statements[-1:] == [b"COMMIT"]


def after_commit(message: Message) -> bool:
    """The answer to COMMIT, which the server has done by then."""
    return message.sender == "server" and message.kind == b"C" and message.body == b"COMMIT\0"


def any_query(message: Message) -> bool:
    """Any message to the server, once the connection is open."""
    return message.sender == "client" and message.kind not in {b"", b"p"}


def any_answer(message: Message) -> bool:
    """Any message to the client."""
    return message.sender == "server"


class _Frames:
    """Cuts one direction's bytes into messages."""

    def __init__(self, sender: Side) -> None:
        self._sender: Side = sender
        self._is_opening = sender == "client"
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are complete now."""
        self._rest += data
        while True:
            kind = b"" if self._is_opening else self._rest[:1]
            if len(self._rest) < len(kind) + 4:
                return
            end = len(kind) + struct.unpack_from("!I", self._rest, len(kind))[0]
            if len(self._rest) < end:
                return
            message = Message(self._sender, kind, self._rest[:end])
            self._rest = self._rest[end:]
            self._is_opening = message.wants_encryption
            yield message


# --------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------


class Fault:
    """What is going to happen, and where; made by `Proxy.arm()`.

    Attributes:
        action: What.

        struck: The connections that it has happened to.
    """

    def __init__(
        self,
        action: Action,
        place: Place,
        *,
        nth: int,
        times: int | None,
        seconds: float,
        link: "Link | None",
    ) -> None:
        self.action = action
        self.struck: list[Link] = []
        self._place = place
        self._nth = nth
        self._left = times
        self._seconds = seconds
        self._link = link
        self._seen: Counter[Link] = Counter()
        self._has_struck = asyncio.Event()

    @property
    def is_armed(self) -> bool:
        """Whether it may still happen."""
        return self._left is None or self._left > 0

    async def wait(self) -> None:
        """Wait until it has happened."""
        async with asyncio.timeout(PATIENCE):
            await self._has_struck.wait()

    def disarm(self) -> None:
        """Let it not happen any more; what it has stalled stays so."""
        self._left = 0

    def resume(self) -> None:
        """Let the connections that it has stalled go on."""
        for link in self.struck:
            link.client.resume()
            link.server.resume()

    def is_due(self, link: "Link", message: Message) -> bool:
        """Whether it happens now, in the place of *message*."""
        if not self.is_armed or self._link not in {None, link} or not self._place(message):
            return False
        self._seen[link] += 1
        return self._seen[link] >= self._nth

    def happen(self, end: "End", message: Message) -> None:
        """Do it; *end* has sent *message*, which isn't passed on."""
        self.struck.append(end.link)
        del self._seen[end.link]
        if self._left is not None:
            self._left -= 1
        if self.action == "cut":
            end.link.cut()
        elif self.action == "swallow":
            end.swallow()
        else:
            end.stall(message)
            if self.action == "delay":
                asyncio.get_running_loop().call_later(self._seconds, end.resume)
        self._has_struck.set()


# --------------------------------------------------------------------------------------
# Connections
# --------------------------------------------------------------------------------------


class End(asyncio.Protocol):
    """One end of a connection: what it sends goes to the other one."""

    def __init__(self, link: "Link", side: Side) -> None:
        self.link = link
        self.transport: asyncio.Transport | None = None
        self._frames = _Frames(side)
        self._is_swallowed = False
        self._stalled: Message | None = None
        # The client's are kept until the proxy is connected to the server.
        self._held: list[Message] | None = [] if side == "client" else None

    @property
    def _other(self) -> "End":
        return self.link.server if self is self.link.client else self.link.client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.link.note_open(self)

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            if message.wants_encryption:
                assert self.transport is not None
                self.transport.write(b"N")
            else:
                self._take(message)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio calls it
        self.link.close()

    def pause_writing(self) -> None:
        if self._other.transport is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other.transport is not None:
            self._other.transport.resume_reading()

    def _take(self, message: Message) -> None:
        if self._held is not None:
            self._held.append(message)
        elif not self._is_swallowed:
            fault = self.link.find_fault(message)
            if fault is None:
                self._pass_on(message)
            else:
                fault.happen(self, message)

    def _pass_on(self, message: Message) -> None:
        transport = self._other.transport
        if transport is not None and not transport.is_closing():
            transport.write(message.data)

    def swallow(self) -> None:
        """Nothing that it sends arrives any more, although the connection stays open."""
        self._is_swallowed = True

    def stall(self, message: Message) -> None:
        """*message* and what follows it wait until `resume()`."""
        self._stalled = message
        self._held = []

    def resume(self) -> None:
        """Pass on what has waited."""
        stalled, self._stalled = self._stalled, None
        held, self._held = self._held, None
        if stalled is not None:
            self._pass_on(stalled)
        for message in held or ():
            self._take(message)


class Link:
    """One connection through the proxy.

    Attributes:
        client: The end that came to the proxy.

        server: The end that the proxy has opened.

        pid: The process of the server's that serves it; 0 until it says so.
    """

    def __init__(self, proxy: "Proxy") -> None:
        self.client = End(self, "client")
        self.server = End(self, "server")
        self.pid = 0
        self._proxy = proxy

    def note_open(self, end: End) -> None:
        """One end is there; without the other it waits."""
        if end is self.client:
            self._proxy.note_client(self)
        elif self.client.transport is None or self.client.transport.is_closing():
            self.close()  # the client didn't wait
        else:
            self.client.resume()

    def find_fault(self, message: Message) -> Fault | None:
        """The fault that happens in the place of *message*, if one does."""
        if message.kind == b"K" and message.sender == "server":
            (self.pid,) = struct.unpack_from("!I", message.body)
        return self._proxy.find_fault(self, message)

    def cut(self) -> None:
        """End it at once, at both ends, with what is on its way."""
        self._proxy.links.discard(self)
        for end in (self.client, self.server):
            if end.transport is not None:
                end.transport.abort()

    def close(self) -> None:
        """End it, after what has been passed on has arrived."""
        self._proxy.links.discard(self)
        for end in (self.client, self.server):
            if end.transport is not None:
                end.transport.close()


class Proxy:
    """Stands between clients and a PostgreSQL server, in this event loop.

    Args:
        target: Where the server is.

        tcp: Whether to listen on a port of the loopback interface, instead of a unix socket.

    Attributes:
        is_down: Whether new connections are ended at once, as where there is no server.

        links: The connections that are open.
    """

    def __init__(self, target: sa.URL, *, tcp: bool = False) -> None:
        self.is_down = False
        self.links: set[Link] = set()
        self._target = target
        self._is_tcp = tcp
        self._directory = tempfile.TemporaryDirectory(prefix="dbscope-proxy-")
        self._server: asyncio.Server | None = None
        self._connecting: set[asyncio.Task[None]] = set()
        self._faults: list[Fault] = []

    @property
    def url(self) -> sa.URL:
        """Where to connect to, instead of the server."""
        if not self._is_tcp:
            return self._target.set(host=None, port=None, query={"host": self._directory.name})
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return self._target.set(host="127.0.0.1", port=port, query={})

    def arm(
        self,
        action: Action,
        place: Place,
        *,
        nth: int = 1,
        times: int | None = 1,
        seconds: float = 0.0,
        link: Link | None = None,
    ) -> Fault:
        """Let something happen.

        Args:
            action: `"cut"`: the connection ends, for both. `"swallow"`: the message and all that
                follows it from there get lost, and the connection stays open. `"stall"`: they wait
                until `Fault.resume()`. `"delay"`: they wait *seconds*.

            place: Which messages are meant.

            nth: At which of them, counted for each connection from now on.

            times: How often; `None` is always.

            seconds: Of a delay.

            link: To which connection alone.
        """
        fault = Fault(action, place, nth=nth, times=times, seconds=seconds, link=link)
        self._faults.append(fault)
        return fault

    def disarm(self) -> None:
        """Let nothing happen any more."""
        self._faults.clear()

    def cut(self) -> None:
        """End every connection."""
        for link in list(self.links):
            link.cut()

    def find_fault(self, link: Link, message: Message) -> Fault | None:
        """The fault that happens to *link* in the place of *message*, if one does."""
        self._faults = [fault for fault in self._faults if fault.is_armed]
        return next((fault for fault in self._faults if fault.is_due(link, message)), None)

    def note_client(self, link: Link) -> None:
        """A client has come."""
        self.links.add(link)
        if self.is_down:
            link.cut()
            return
        connecting = asyncio.create_task(self._connect(link))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    async def _connect(self, link: Link) -> None:
        loop = asyncio.get_running_loop()
        directory = self._target.query.get("host")
        port = self._target.port or 5432
        try:
            if isinstance(directory, str) and directory.startswith("/"):
                path = str(Path(directory, f".s.PGSQL.{port}"))
                await loop.create_unix_connection(lambda: link.server, path)
            else:
                host = self._target.host or "localhost"
                await loop.create_connection(lambda: link.server, host, port)
        except OSError:
            link.cut()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()

        def accept() -> End:
            return Link(self).client

        if self._is_tcp:
            self._server = await loop.create_server(accept, "127.0.0.1")
        else:
            path = Path(self._directory.name, ".s.PGSQL.5432")
            self._server = await loop.create_unix_server(accept, path)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        for connecting in list(self._connecting):
            connecting.cancel()
        self.cut()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        self.cut()
        self._directory.cleanup()
