"""A client of HTTP/2 that sees frames, and is used as the one of HTTP/1.1 is."""

import contextlib
import select
import time
from dataclasses import dataclass, field
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, PingAckReceived, ResponseReceived, StreamEnded, StreamReset
from h2.exceptions import StreamClosedError

from tests.server.clients import PATIENCE, Client, Torn, receive

_GOAWAY = 7
"""The type of the frame by which a server says that it takes no more requests."""


@dataclass
class Stream:
    """A request and what has come of its response.

    Attributes:
        number: Its id on the connection.

        head: Status and headers, once they are there.

        body: What has come of the body and wasn't read yet.

        held: How much of that the server has not been given room for again.

        is_whole: Whether the body has come to its clean end.

        error: What the server said when it reset the stream.
    """

    number: int
    head: tuple[int, dict[str, str]] | None = None
    body: bytearray = field(default_factory=bytearray)
    held: int = 0
    is_whole: bool = False
    error: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes."""
        return self.is_whole or self.error is not None


class Http2Client(Client):
    """One connection with many requests on it, without TLS and without having asked for it.

    Responses are read in the order of their requests, whichever came first. The connection has
    room for everything, a stream for as much as was read of it.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._http2 = H2Connection(H2Configuration(client_side=True))
        self._streams: dict[int, Stream] = {}
        self._unread: list[Stream] = []
        self._current: Stream
        self._is_acknowledged = False
        self._is_sent_away = False
        self._http2.initiate_connection()
        self._http2.increment_flow_control_window(1 << 30)
        self._flush()

    def __exit__(self, *exc_info: object) -> None:
        """The connection's end is a case of its own: whoever made it closes it when all is over."""

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def send(self, method: str, path: str, *, body: bytes = b"", length: int = 0) -> None:
        self._begin(method, path, body, length)
        self._flush()

    def send_all(self, *requests: tuple[str, str]) -> None:
        for method, path in requests:
            self._begin(method, path, b"", 0)
        self._flush()

    def go_on(self, data: bytes) -> None:
        """Send more of the last request's body, unless the server wants no more of it."""
        with contextlib.suppress(StreamClosedError):
            self._http2.send_data(max(self._streams), data)
        self._flush()

    def head(self, of: int = 0) -> tuple[int, dict[str, str]]:
        """The status and headers of the request at *of* among those whose head wasn't read."""
        self._current = stream = self._unread.pop(of)
        while stream.head is None:
            self._receive_of(stream)
        return stream.head

    def chunk(self) -> bytes:
        stream = self._current
        while not stream.body and not stream.is_whole:
            self._receive_of(stream)
        return self._take(stream)

    def body(self, headers: dict[str, str]) -> bytes:
        chunks = []
        while data := self.chunk():
            chunks.append(data)
        return b"".join(chunks)

    def has_bytes(self, within: float = 0.0) -> bool:
        """Whether anything has come of the response that is next, or the end of it."""
        deadline = time.monotonic() + within
        stream = self._unread[0] if self._unread else self._current
        while not (stream.has_ended or stream.body or (self._unread and stream.head)):
            if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
            try:
                self._receive()
            except Torn:
                return True
        return True

    def has_ended(self, within: float = PATIENCE) -> bool:
        """Whether the server resets the stream, or closes the connection."""
        return self.has_bytes(within) and not self._current.body and not self._current.is_whole

    def leave(self) -> None:
        """Reset the stream of the last request, or the connection where its response was whole.

        Of a stream the server knows when this returns.
        """
        last = self._streams[max(self._streams)]
        if last.has_ended:
            super().leave()
        else:
            self._reset([last])

    def leave_all(self) -> None:
        """Reset the streams of all requests that are under way."""
        self._reset([each for each in self._streams.values() if not each.has_ended])

    def _reset(self, streams: list[Stream]) -> None:
        for stream in streams:
            self._http2.reset_stream(stream.number, ErrorCodes.CANCEL)
            if stream in self._unread:
                self._unread.remove(stream)
        self.wait_until_seen()

    def drop(self) -> None:
        """Reset the connection, with all requests that are under way."""
        super().leave()

    def go_away(self) -> None:
        """Tell the server that the connection ends here, and close it."""
        self._http2.close_connection()
        self._flush()
        self.close()

    def wait_until_seen(self) -> None:
        """Wait until the server has taken in what was sent up to now."""
        self._is_acknowledged = False
        self._http2.ping(b"whereami")
        self._flush()
        while not self._is_acknowledged:
            self._receive()

    def _begin(self, method: str, path: str, body: bytes, length: int) -> None:
        if self._is_sent_away:
            raise Torn("the server takes no more requests")
        number = self._http2.get_next_available_stream_id()
        headers = [
            (":method", method),
            (":scheme", "http"),
            (":authority", "test"),
            (":path", path),
            ("content-length", str(length or len(body))),
        ]
        is_whole = len(body) >= length
        self._http2.send_headers(number, headers, end_stream=is_whole and not body)
        if body:
            self._http2.send_data(number, body, end_stream=is_whole)
        self._streams[number] = Stream(number)
        self._unread.append(self._streams[number])

    def _take(self, stream: Stream) -> bytes:
        data = bytes(stream.body)
        stream.body.clear()
        if stream.held and not stream.has_ended:
            self._http2.increment_flow_control_window(stream.held, stream.number)
        stream.held = 0
        self._flush()
        return data

    def _receive_of(self, stream: Stream) -> None:
        if stream.error is not None:
            raise Torn(f"the stream was reset: {stream.error}")
        self._receive()

    def _receive(self) -> None:
        data = receive(self._socket)
        if not data:
            raise Torn("the connection was closed")
        self._received += data
        while frame := self._next_frame():
            if frame[3] == _GOAWAY:  # to `h2` all is over with it, also what is under way
                self._is_sent_away = True
                continue
            for event in self._http2.receive_data(frame):
                self._handle(event)
        self._flush()

    def _next_frame(self) -> bytes:
        length = 9 + int.from_bytes(self._received[:3], "big")
        if len(self._received) < length:
            return b""
        frame = bytes(self._received[:length])
        del self._received[:length]
        return frame

    def _handle(self, event: Any) -> None:
        if isinstance(event, PingAckReceived):
            self._is_acknowledged = True
        stream = self._streams.get(getattr(event, "stream_id", 0))
        if stream is None:
            return
        if isinstance(event, ResponseReceived):
            headers = {name.decode(): value.decode() for name, value in event.headers}
            stream.head = int(headers[":status"]), headers
        elif isinstance(event, DataReceived):
            stream.body += event.data
            stream.held += event.flow_controlled_length
        elif isinstance(event, StreamEnded):
            stream.is_whole = True
        elif isinstance(event, StreamReset):
            stream.error = event.error_code

    def _flush(self) -> None:
        with contextlib.suppress(ConnectionError):  # who reads finds out
            self._socket.sendall(self._http2.data_to_send())
