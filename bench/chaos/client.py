"""One HTTP client: it says how far a response came, and leaves where it is told to."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Literal

Leaves = Literal["never", "before body", "in handler", "after head", "in body"]

PATIENCE = 20.0
"""Seconds until a client gives up."""


@dataclass
class Answer:
    """What a client got.

    Attributes:
        status: 0 where no head came.

        headers: Those of the response.

        is_complete: Whether the body came to its clean end.

        body: As much as was read.

        is_hung: Whether the client gave up waiting.

        was_sent: Whether there was a server to send it to.

        has_left: Whether the client was gone at the stage where it meant to go.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    is_complete: bool = False
    body: bytes = b""
    is_hung: bool = False
    was_sent: bool = False
    has_left: bool = False


class Client:
    """A connection that is kept alive, and opened anew where it was lost."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def request(
        self,
        method: str,
        path: str,
        content: Any = None,
        *,
        leaves: Leaves = "never",
        after: float = 0.0,
        patience: float = PATIENCE,
    ) -> Answer:
        """Send a request; return what came back, however little.

        Args:
            method: `POST`, say.

            path: With its query.

            content: Sent as JSON.

            leaves: At which stage the client is gone.

            after: Seconds that it stays in that stage.

            patience: Seconds until it gives up.
        """
        answer = Answer()
        try:
            async with asyncio.timeout(patience):
                await self._exchange(method, path, content, leaves, after, answer)
        except TimeoutError:
            answer.is_hung = True
            self.leave()
        except (OSError, asyncio.IncompleteReadError, ValueError):
            self.leave()
        except BaseException:
            self.leave()
            raise
        return answer

    async def _exchange(  # noqa: PLR0917
        self,
        method: str,
        path: str,
        content: Any,
        leaves: Leaves,
        after: float,
        answer: Answer,
    ) -> None:
        if self._reader is not None and self._reader.at_eof():
            self.leave()  # the server has closed it meanwhile
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        assert self._reader is not None
        answer.was_sent = True
        body = b"" if content is None else json.dumps(content).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: ledger\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        ).encode()
        if leaves == "before body":
            self._writer.write(head + body[: len(body) // 2])
            await asyncio.sleep(after)
            answer.has_left = True
            self.leave()
            return
        self._writer.write(head + body)
        try:
            async with asyncio.timeout(after if leaves == "in handler" else None):
                await self._read_head(self._reader, answer)
        except TimeoutError:
            answer.has_left = True
            self.leave()
            return
        is_stream = "chunked" in answer.headers.get("transfer-encoding", "")
        if is_stream and leaves == "after head":
            await asyncio.sleep(after)
            answer.has_left = True
            self.leave()
            return
        await self._read_body(self._reader, answer, is_leaving=leaves == "in body")
        answer.has_left = is_stream and not answer.is_complete
        if answer.headers.get("connection") == "close" or not answer.is_complete:
            self.leave()

    async def _read_head(self, reader: asyncio.StreamReader, answer: Answer) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        answer.headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        answer.status = int(lines[0].split()[1])

    async def _read_body(
        self, reader: asyncio.StreamReader, answer: Answer, *, is_leaving: bool
    ) -> None:
        if "chunked" not in answer.headers.get("transfer-encoding", ""):
            answer.body = await reader.readexactly(int(answer.headers.get("content-length", 0)))
            answer.is_complete = True
            return
        while True:
            length = int(await reader.readuntil(b"\r\n"), 16)
            answer.body += await reader.readexactly(length)
            await reader.readexactly(2)
            if not length:
                answer.is_complete = True
                return
            if is_leaving:
                return

    def leave(self) -> None:
        """Drop the connection."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None
