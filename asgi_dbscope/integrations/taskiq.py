"""taskiq: a session scope for each message, committed before its result and its acknowledgement."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from taskiq import TaskiqMiddleware
from taskiq.acks import AcknowledgeType, parse_acknowledge_type
from taskiq.utils import maybe_awaitable

from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from taskiq import TaskiqMessage, TaskiqResult

    from asgi_dbscope._database import Database
    from asgi_dbscope._policy import Mode

logger = logging.getLogger("asgi_dbscope")


class SessionScopeMiddleware(TaskiqMiddleware):
    """Give each message a session scope: ``with_middlewares(SessionScopeMiddleware(db))``.

    It is committed after the task and the exits of its dependencies, before the result is saved
    and the message acknowledged; rolled back if the task raises. A COMMIT that fails is the task's
    failure: the result is the error, and middlewares that retry hear of it.

    Messages are acknowledged ``when_saved``, whatever ``--ack-type`` the worker has, because the
    other moments are before the commit. A task with ``ack_type="manual"`` keeps that.

    Put it last in the list, next to the task. Needs taskiq 0.12.5.

    Args:
        database: With an async engine. A ``def`` task on a synchronous one is decorated with
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
        super().__init__()
        self._database = database
        self._options: dict[str, Any] = {
            "mode": mode,
            "read_only": read_only,
            "isolation_level": isolation_level,
        }
        if database.is_sync:
            msg = (
                f"{database!r} is synchronous, and this middleware works in the event loop. "
                "Decorate the `def` tasks with @db.session_scope() instead."
            )
            raise ConfigurationError(msg)
        database.session_scope(**self._options)  # an error now rather than at the first message
        self._key = f"__session_scope_{id(self)}"  # on the message, where taskiq's tracing is too
        self._cleanups: set[asyncio.Task[None]] = set()

    async def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Open the scope."""
        asked = message.labels.get("ack_type", AcknowledgeType.WHEN_SAVED)
        ack_type = parse_acknowledge_type(asked)
        if ack_type is not AcknowledgeType.MANUAL:
            if ack_type is not AcknowledgeType.WHEN_SAVED:
                logger.warning(
                    "%s: ack_type=%r would acknowledge the message before its transaction is "
                    "committed; 'when_saved' is used",
                    message.task_name,
                    ack_type.value,
                )
            message.labels["ack_type"] = AcknowledgeType.WHEN_SAVED.value
        block = self._database.session_scope(**self._options)
        await block.__aenter__()
        vars(message)[self._key] = block
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda task: self._clean_up(message, task))
        return message

    async def on_error(
        self,
        message: TaskiqMessage,
        result: TaskiqResult[Any],  # noqa: ARG002 - the interface's
        exception: BaseException,
    ) -> None:
        """Roll back; a worker that is being stopped leaves the message to be delivered again."""
        await self._end(message, exception)
        task = asyncio.current_task()
        assert task is not None
        if isinstance(exception, asyncio.CancelledError) and task.cancelling():
            raise exception

    async def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """Commit, unless the task has failed."""
        if result.is_err:
            return
        try:
            await self._end(message, None)
        except Exception as error:
            logger.exception("%s: its session scope ended with an error", message.task_name)
            result.is_err, result.return_value, result.error = True, None, error
            for each in reversed(self.broker.middlewares):
                await maybe_awaitable(each.on_error(message, result, error))

    async def _end(self, message: TaskiqMessage, error: BaseException | None) -> None:
        block = vars(message).pop(self._key, None)
        if block is not None:
            await block.__aexit__(type(error) if error else None, error, None)
        elif error is None:
            msg = (
                "A middleware has exchanged the message, and the session scope was lost with it. "
                "Put SessionScopeMiddleware last in the list."
            )
            raise ConfigurationError(msg)

    def _clean_up(self, message: TaskiqMessage, task: asyncio.Task[Any]) -> None:
        """Roll back what nobody ended: another middleware, or a dependency's exit, has raised."""
        if self._key in vars(message):
            cleanup = task.get_loop().create_task(self._end(message, RuntimeError()))
            self._cleanups.add(cleanup)
            cleanup.add_done_callback(self._cleanups.discard)
