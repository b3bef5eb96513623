"""Cut a coroutine short at its n-th suspension, for every n.

Every suspension of every task that the coroutine starts is counted, not only its own: a COMMIT that
runs in a task by itself is one long wait seen from outside, and many suspensions seen from inside.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import anyio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

Kind = Literal["once", "repeatedly", "scope", "timeout", "shutdown"]
Moment = Literal["suspending", "resuming"]

KINDS: tuple[Kind, ...] = ("once", "repeatedly", "scope", "timeout")
"""Native once, native at each suspension from then on, anyio's cancel scope, asyncio.timeout()."""

MOMENTS: tuple[Moment, ...] = ("suspending", "resuming")
"""As it begins to wait, or as what it waited for has come: the result is lost on the way."""

ENOUGH = 20.0
"""Seconds after which a run that was cancelled counts as one that hangs."""


class Cut:
    """One run of a coroutine, cancelled at one suspension.

    Attributes:
        was_struck: Whether the cancellation was issued.

        was_over: Whether the coroutine had returned before the cancellation.
    """

    def __init__(self, kind: Kind, moment: Moment, at: int) -> None:
        self.was_struck = False
        self.was_over = False
        self._kind = kind
        self._moment = moment
        self._at = at
        self._count = 0
        self._is_armed = False
        self._strike: Callable[[], object] | None = None

    def arm(self) -> None:
        """Count from here on."""
        self._is_armed = True

    async def run(self, operation: Callable[[], Awaitable[object]]) -> str:
        """Run *operation*, then wait for ever: only the cancellation ends it.

        Returns:
            How it ended: `"cancelled"`, or the error's representation.
        """
        with self._counting():
            task = asyncio.create_task(self._run(operation))
            if self._kind in {"once", "repeatedly"}:
                self._strike = task.cancel
            elif self._kind == "shutdown":
                kept = asyncio.all_tasks() - {task}
                self._strike = lambda: [each.cancel() for each in asyncio.all_tasks() - kept]
            await asyncio.wait({task}, timeout=ENOUGH)
        assert task.done(), f"the cancellation was lost: {task}"
        if task.cancelled():
            return "cancelled"
        error = task.exception()
        return task.result() if error is None else repr(error)

    async def _run(self, operation: Callable[[], Awaitable[object]]) -> str:
        if self._kind == "scope":
            with anyio.CancelScope() as scope:
                self._strike = scope.cancel
                await self._run_then_wait(operation)
            return "cancelled" if scope.cancelled_caught else "not cancelled"
        if self._kind == "timeout":
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(None) as timeout:
                    self._strike = lambda: timeout.reschedule(loop.time())
                    await self._run_then_wait(operation)
            except TimeoutError:
                task = asyncio.current_task()
                assert task is not None
                assert 0 == task.cancelling(), "a request to cancel was left on the task"
                await asyncio.sleep(0)  # nor does one come late
                await asyncio.sleep(0)
                return "cancelled"
        await self._run_then_wait(operation)
        return "not cancelled"

    async def _run_then_wait(self, operation: Callable[[], Awaitable[object]]) -> None:
        await operation()
        self.was_over = not self.was_struck
        self.arm()
        self._at = min(self._at, self._count + 1)
        await asyncio.sleep(0)
        await asyncio.Event().wait()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def counted_task(
            loop: asyncio.AbstractEventLoop, coro: Any, **options: Any
        ) -> asyncio.Task[Any]:
            return asyncio.Task(_Watched(coro, self._suspended), loop=loop, **options)

        before = loop.get_task_factory()
        loop.set_task_factory(counted_task)
        try:
            yield
        finally:
            loop.set_task_factory(before)

    def _suspended(self, waited_for: object) -> None:
        if not self._is_armed:
            return
        self._count += 1
        if self._count < self._at or (self.was_struck and self._kind != "repeatedly"):
            return
        self.was_struck = True
        assert self._strike is not None
        strike = self._strike
        if self._moment == "suspending":
            strike()
        elif isinstance(waited_for, asyncio.Future):
            waited_for.add_done_callback(lambda _: strike())
        else:
            asyncio.get_running_loop().call_soon(strike)


class _Watched(Coroutine[Any, Any, Any]):
    """A coroutine that tells whenever it suspends."""

    def __init__(self, coro: Coroutine[Any, Any, Any], suspended: Callable[[object], None]) -> None:
        self._coro = coro
        self._suspended = suspended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coro, name)  # what asyncio and anyio ask of a coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        raise NotImplementedError  # a task steps it

    def send(self, value: Any) -> Any:
        step = self._coro.send(value)
        self._suspended(step)
        return step

    def throw(self, *error: Any) -> Any:
        step = self._coro.throw(*error)
        self._suspended(step)
        return step

    def close(self) -> None:
        self._coro.close()


class SlowCommit:
    """Makes each COMMIT of a row in PostgreSQL wait until it is let through."""

    LOCK = 4712

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._connection: Any = None

    async def __aenter__(self) -> Self:
        async with self._engine.begin() as connection:
            function = f"""
                CREATE OR REPLACE FUNCTION wait_at_commit() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_advisory_xact_lock({self.LOCK}); RETURN NULL; END $$
            """
            trigger = """
                CREATE CONSTRAINT TRIGGER wait_at_commit AFTER INSERT ON item
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait_at_commit()
            """
            await connection.execute(sa.text(function))
            await connection.execute(sa.text(trigger))
        self._connection = await self._engine.connect()
        await self._connection.execute(sa.select(sa.func.pg_advisory_lock(self.LOCK)))
        await self._connection.commit()
        return self

    async def wait_until_reached(self) -> None:
        """Wait until a COMMIT waits."""
        waiting = sa.text(  # of this database: other workers of the test run have others
            "SELECT count(*) FROM pg_locks JOIN pg_database ON database = pg_database.oid "
            "WHERE datname = current_database() AND locktype = 'advisory' AND NOT granted"
        )
        async with self._engine.connect() as connection:
            while not await connection.scalar(waiting):
                await asyncio.sleep(0.001)  # another process begins to wait

    async def let_through(self) -> None:
        """Let every COMMIT through."""
        await self._connection.execute(sa.select(sa.func.pg_advisory_unlock_all()))
        await self._connection.commit()

    async def __aexit__(self, *error: object) -> None:
        await self.let_through()
        await self._connection.close()
        async with self._engine.begin() as connection:
            await connection.execute(sa.text("DROP TRIGGER wait_at_commit ON item"))
