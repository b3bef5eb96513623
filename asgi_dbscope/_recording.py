"""What a server tells of a request, kept so that another attempt can be told it again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import anyio

from asgi_dbscope._messages import type_of

if TYPE_CHECKING:
    from asgi_dbscope._asgi import Message, Receive


class Recording:
    """The messages of a request, in their order.

    Attributes:
        messages: What has come, and is kept.

        size: How many bytes of the body have come.

        has_left: Whether the client has left.

        is_complete: Whether the end of the body has come.

        is_full: Whether the body is longer than what is kept of one.

        is_over: Whether no other attempt needs what one has read.
    """

    __slots__ = (
        "_arrived",
        "_is_waiting",
        "_limit",
        "_receive",
        "has_left",
        "is_complete",
        "is_full",
        "is_over",
        "messages",
        "size",
    )

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._is_waiting = False
        self._arrived: anyio.Event | None = None
        self.messages: list[Message] = []
        self.size = 0
        self.has_left = False
        self.is_complete = False
        self.is_full = False
        self.is_over = False

    async def fetch(self) -> None:
        """Wait for another message; two readers, such as a task that is left over, for the same."""
        if self._is_waiting:
            if self._arrived is None:
                self._arrived = anyio.Event()
            await self._arrived.wait()
            return
        self._is_waiting = True
        try:
            self._keep(await self._receive())
        finally:
            self._is_waiting = False
            if self._arrived is not None:
                self._arrived.set()
                self._arrived = None

    def _keep(self, message: Message) -> None:
        kind = type_of(message)
        if kind == "http.disconnect":
            self.has_left = True
        elif kind == "http.request" and not self.is_over:
            kept = dict(message)
            content = kept.get("body")
            if isinstance(content, (bytes, bytearray, memoryview)):  # else the app is to object
                content = bytes(cast("bytes", content))  # who sent it may use its memory again
                kept["body"] = content
                self.size += len(content)
            self.is_complete = not kept.get("more_body", False)
            self.is_full = self.is_over = self.size > self._limit
            message = kept
        self.messages.append(message)

    async def client_leaves(self, delay: float) -> bool:
        """Wait for *delay* seconds; ``True`` as soon as the client leaves.

        Whoever waits for a client's leaving reads what it sends before that.
        """
        # A cancellation that is to be delivered again arrives here. Together with the end of the
        # time below it would be taken for that.
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(delay):
                while not self.is_full:
                    if self.has_left:
                        return True
                    was_complete = self.is_complete
                    try:
                        await self.fetch()
                    except Exception:  # noqa: BLE001 - nobody has asked for a message
                        break
                    if was_complete and not self.has_left:
                        break  # it says nothing new, and may do so for ever
                    await asyncio.sleep(0)  # nor does one that never waits hold up the clock
                await asyncio.sleep(delay)
        except TimeoutError:
            # Whoever was woken by the same moment goes first: what it does may forbid an attempt.
            await asyncio.sleep(0)
        return False


class Reader:
    """One attempt's ``receive``: what was kept, and then what is new.

    Attributes:
        is_lost: Whether its attempt has lost: for what is left of it nobody is there any more.
    """

    __slots__ = ("_position", "_recording", "is_lost")

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._position = 0
        self.is_lost = False

    async def read(self) -> Message:
        """The next message."""
        recording = self._recording
        while not self.is_lost and self._position == len(recording.messages):
            await recording.fetch()
        if self.is_lost:
            return {"type": "http.disconnect"}
        message = recording.messages[self._position]
        self._position += 1
        if recording.is_over:
            self.forget()
        elif type_of(message) == "http.request":
            return dict(message)
        return message

    def forget(self) -> None:
        """There is no attempt after this one: what it has read need not be kept any more."""
        recording = self._recording
        recording.is_over = True
        del recording.messages[: self._position]
        self._position = 0
