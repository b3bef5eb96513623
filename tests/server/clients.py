"""A client of HTTP/1.1 that sees bytes."""

import select
import socket
import struct
from typing import Self

PATIENCE = 60.0
"""Seconds until something that a server should do counts as not done."""


class Torn(Exception):  # noqa: N818 - what a client finds, not an error of ours
    """The connection ended before the response did; the message is what came of it."""


class Client:
    """One connection, and what comes over it. It reads as little as it is asked for."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket()
        # A client that doesn't read soon blocks.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(PATIENCE)
        self._received = bytearray()
        try:
            self._socket.connect(("127.0.0.1", port))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def send(self, method: str, path: str, *, body: bytes = b"", length: int = 0) -> None:
        """Send a request; read nothing. *length* claims a longer body."""
        self._socket.sendall(_request(method, path, length or len(body)) + body)

    def send_all(self, *requests: tuple[str, str]) -> None:
        """Send requests in one piece, the next before the first is answered."""
        self._socket.sendall(b"".join(_request(method, path, 0) for method, path in requests))

    def head(self) -> tuple[int, dict[str, str]]:
        """The response's status and headers."""
        lines = self._read_until(b"\r\n\r\n").decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    def chunk(self) -> bytes:
        """One chunk of a chunked body; empty at its clean end."""
        data = self._read(int(self._read_until(b"\r\n"), 16) + 2)
        return data[:-2]

    def body(self, headers: dict[str, str]) -> bytes:
        """The whole body."""
        if "chunked" not in headers.get("transfer-encoding", ""):
            return self._read(int(headers.get("content-length", 0)))
        chunks = []
        while data := self.chunk():
            chunks.append(data)
        return b"".join(chunks)

    def request(self, method: str, path: str, *, body: bytes = b"") -> tuple[int, bytes]:
        """Send a request; return the status and the body."""
        self.send(method, path, body=body)
        status, headers = self.head()
        return status, self.body(headers)

    def has_bytes(self, within: float = 0.0) -> bool:
        """Whether anything has come, or the end of the connection."""
        return bool(self._received or select.select([self._socket], [], [], within)[0])

    def has_ended(self, within: float = PATIENCE) -> bool:
        """Whether the server closes the connection, with nothing more on it."""
        if not self.has_bytes(within):
            return False
        try:
            self._received += self._socket.recv(1)
        except ConnectionError:
            return True
        return not self._received

    def leave(self) -> None:
        """Reset the connection, as a client does that is gone."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def end_requests(self) -> None:
        """Close the client's half of the connection: it sends no more, and still reads."""
        self._socket.shutdown(socket.SHUT_WR)

    def _read_until(self, mark: bytes) -> bytes:
        while (end := self._received.find(mark)) < 0:
            self._receive()
        return self._read(end + len(mark))[:end]

    def _read(self, count: int) -> bytes:
        if count > len(self._received) + 65536:  # it has begun to read
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        while len(self._received) < count:
            self._receive()
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def _receive(self) -> None:
        data = receive(self._socket)
        if not data:
            raise Torn(self._received.decode("latin-1"))
        self._received += data


def receive(connection: socket.socket) -> bytes:
    """What comes next; nothing where the connection has ended, in whatever way."""
    try:
        return connection.recv(1 << 20)
    except ConnectionError:
        return b""


def _request(method: str, path: str, length: int) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n"
    return head.encode()
