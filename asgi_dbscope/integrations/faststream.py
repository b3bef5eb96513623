"""FastStream: a session scope for each message, committed before it is acknowledged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from faststream import AckPolicy, BaseMiddleware
from faststream.exceptions import AckMessage
from faststream.message import AckStatus

from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from faststream import ContextRepo, StreamMessage

    from asgi_dbscope._database import Database
    from asgi_dbscope._policy import Mode

logger = logging.getLogger("asgi_dbscope")


class SessionScopeMiddleware:
    """Give each message a session scope: ``middlewares=[SessionScopeMiddleware(db)]``.

    It is committed when the handler returns or raises ``AckMessage``: before what the handler
    returned is published, and before the message is acknowledged. It is rolled back when the
    handler raises anything else, and when it has called ``message.nack()`` or ``reject()`` itself.

    Put it last in the list, so that no other middleware swallows an exception before it sees it.

    Args:
        database: With an async engine. A ``def`` handler on a synchronous one is decorated with
            ``@db.session_scope()`` instead.

        mode: Instead of the database's.

        read_only: Whether the database itself refuses writes.

        isolation_level: As SQLAlchemy spells it.

    Raises:
        ConfigurationError: If an option is wrong, or the database synchronous.
    """

    def __init__(
        self,
        database: Database[Any],
        *,
        mode: Mode | None = None,
        read_only: bool = False,
        isolation_level: str | None = None,
    ) -> None:
        self.database = database
        self.options: dict[str, Any] = {
            "mode": mode,
            "read_only": read_only,
            "isolation_level": isolation_level,
        }
        self.warned: set[str] = set()
        if database.is_sync:
            msg = (
                f"{database!r} is synchronous, and this middleware works in the event loop. "
                "Decorate the `def` handlers with @db.session_scope() instead."
            )
            raise ConfigurationError(msg)
        database.session_scope(**self.options)  # an error now rather than at the first message

    def __call__(self, msg: Any, /, *, context: ContextRepo) -> BaseMiddleware[Any, Any]:
        """What FastStream asks for when a message has come."""
        return _MessageScope(msg, context=context, shared=self)


class _MessageScope(BaseMiddleware[Any, Any]):
    """The scope of one message."""

    def __init__(
        self, msg: Any, /, *, context: ContextRepo, shared: SessionScopeMiddleware
    ) -> None:
        super().__init__(msg, context=context)
        self._shared = shared

    async def consume_scope(
        self, call_next: Callable[[Any], Awaitable[Any]], msg: StreamMessage[Any]
    ) -> Any:
        """Run the handler in a scope."""
        acknowledgement: AckMessage | None = None
        result = None
        database = self._shared.database
        async with database.session_scope(**self._shared.options):
            try:
                result = await call_next(msg)
            except AckMessage as error:  # the handler calls it done, so what it did must stay
                acknowledgement = error
            if msg.committed in {AckStatus.NACKED, AckStatus.REJECTED}:
                if database.scope.options.mode != "autocommit":
                    database.set_rollback_only()
            else:
                self._warn_if_early(msg)
        if acknowledgement is not None:
            raise acknowledgement
        return result

    def _warn_if_early(self, msg: StreamMessage[Any]) -> None:
        """Say, once per subscriber, that the message was acknowledged before the commit."""
        subscriber = self.context.get_local("handler_")
        if subscriber is None:
            return  # not a handler's: get_one(), an iterator, the answer to a request
        if subscriber.ack_policy is AckPolicy.ACK_FIRST:
            remedy = "give its subscriber ack_policy=AckPolicy.NACK_ON_ERROR"
        elif msg.committed is not None:
            remedy = "use db.on_commit(message.ack) instead of message.ack()"
        else:
            return
        if subscriber.calls.name not in self._shared.warned:
            self._shared.warned.add(subscriber.calls.name)
            logger.warning(
                "%s: its messages are acknowledged before the commit, and lost if that fails; %s",
                subscriber.calls.name,
                remedy,
            )
