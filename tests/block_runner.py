"""Run programs of transactional blocks for real: an asynchronous or a synchronous database."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import anyio.to_thread
import sqlalchemy as sa

from asgi_dbscope import Database, DBSessionMiddleware, Propagation
from tests.block_programs import (
    ERRORS,
    RULED,
    Add,
    Begin,
    Block,
    Commit,
    Fail,
    FailFlush,
    Hook,
    Job,
    Orphan,
    Program,
    Raise,
    Read,
    Release,
    Request,
    Rollback,
    Savepoint,
    Scope,
    SetRollbackOnly,
    Statement,
    Stop,
    Swallow,
    Write,
)
from tests.block_session import describe
from tests.fix_asgi import Drive, body, start
from tests.fix_database import Child, Item

SPAN = 1_000
"""How many rows a run may write."""


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run *coroutine*, which waits for nothing, from its beginning to its end."""
    try:
        coroutine.send(None)
    except StopIteration as returned:
        return returned.value
    coroutine.close()
    raise AssertionError("it waited")


class Blocks:
    """The transactional blocks of a database: one object for all that ask for the same.

    Every object is entered again while it is open, by the same task and by others.
    """

    def __init__(self, db: Database[Any]) -> None:
        self.db = db
        self._made: dict[Any, Any] = {}

    def get(self, block: Block) -> Any:
        """The object that *block* enters or decorates with."""
        key = (block.propagation, block.rollback_for, block.no_rollback_for)
        if key not in self._made:
            self._made[key] = self.db.transactional(
                Propagation(block.propagation),
                rollback_for=tuple(RULED[name] for name in block.rollback_for),
                no_rollback_for=tuple(RULED[name] for name in block.no_rollback_for),
            )
        return self._made[key]


class Run:
    """One run of a program.

    Attributes:
        log: What was seen from inside the program.

        status: The response's, if there was one.

        first: What the numbers of its rows begin after.
    """

    def __init__(self, blocks: Blocks, first: int, *, left_out: Collection[int] = ()) -> None:
        self.log: list[str] = []
        self.status: int | None = None
        self.first = first
        self._blocks = blocks
        self._db = blocks.db
        self._left_out = left_out
        self._is_in_plain_hook = False
        self._is_sync = blocks.db.is_sync
        self._statements: dict[type, Callable[[Any], Coroutine[Any, Any, None]]] = {
            Write: self._write,
            Add: self._add,
            Orphan: self._write_orphan,
            Fail: self._fail,
            FailFlush: self._fail_flush,
            Read: self._read,
            Commit: self._commit,
            Release: self._release,
            Rollback: self._roll_back,
            SetRollbackOnly: self._set_rollback_only,
            Raise: self._raise,
            Hook: self._register,
            Swallow: self._swallow,
            Savepoint: self._savepoint,
            Begin: self._begin,
            Scope: self._scope,
            Block: self._block,
        }

    async def run(self, program: Program, drive: Drive) -> None:
        """Run *program* to its end."""
        error: BaseException | None = None
        if isinstance(program, Request):
            app = DBSessionMiddleware(
                partial(self._app, program), database=self._db, mode=program.mode
            )
            exchange = await drive(app)
            self.status, error = exchange.status, exchange.error
        else:
            try:
                await self._threaded(self._job(program))
            except (Exception, Stop) as raised:
                error = raised
        if error is not None:
            self.log.append(f"raised {describe(error)}")

    async def _threaded(self, program: Coroutine[Any, Any, None]) -> None:
        if self._is_sync:
            await anyio.to_thread.run_sync(finish, program)
        else:
            await program

    async def _job(self, job: Job) -> None:
        if job.mode is None:
            await self._body(job.body)
        else:
            async with self._entered(self._db.session_scope(mode=job.mode)):
                await self._body(job.body)

    async def _app(self, request: Request, scope: Any, receive: Any, send: Any) -> None:
        await self._threaded(self._body(request.body))
        if request.is_handled:
            try:
                raise LookupError
            except LookupError:
                await send(start(request.status))
        else:
            await send(start(request.status))
        await send(body(b"done"))
        await self._threaded(self._body(request.background))

    # ---------------------------------------------------------------- statements

    async def _body(self, statements: Sequence[Statement]) -> None:
        for each in statements:
            if getattr(each, "id", None) not in self._left_out:
                await self._statements[type(each)](each)

    async def _write(self, statement: Write) -> None:
        row = sa.insert(Item).values(id=self.first + statement.id)
        await self._call(self._db.session.execute, row)

    async def _add(self, statement: Add) -> None:
        self._db.session.add(Item(id=self.first + statement.id))

    async def _write_orphan(self, statement: Orphan) -> None:
        row = sa.insert(Child).values(id=self.first + statement.id, item_id=-1)
        await self._call(self._db.session.execute, row)

    async def _fail(self, statement: Fail) -> None:
        wrong = sa.select(Item.id).where(sa.literal_column("nothing") == 1)
        await self._call(self._db.session.execute, wrong)

    async def _fail_flush(self, statement: FailFlush) -> None:
        await self._call(self._db.session.flush)
        self._db.session.add(Child(id=self.first + statement.id))  # without an item_id
        await self._call(self._db.session.flush)

    async def _read(self, statement: Read) -> None:
        mine = sa.select(Item.id).where(Item.id.between(self.first, self.first + SPAN - 1))
        seen = await self._call(self._db.session.scalars, mine)
        self.log.append(f"sees {sorted(each - self.first for each in seen)}")

    async def _commit(self, statement: Commit) -> None:
        await self._call(self._db.session.commit)

    async def _release(self, statement: Release) -> None:
        await self._call(self._db.release)

    async def _roll_back(self, statement: Rollback) -> None:
        await self._call(self._db.session.rollback)

    async def _set_rollback_only(self, statement: SetRollbackOnly) -> None:
        self._db.set_rollback_only()

    async def _raise(self, statement: Raise) -> None:
        raise ERRORS[statement.error](statement.id)

    async def _swallow(self, statement: Swallow) -> None:
        try:
            await self._body(statement.body)
        except Exception as error:
            self.log.append(f"swallowed {describe(error)}")

    async def _savepoint(self, statement: Savepoint) -> None:
        async with self._entered(self._db.session.begin_nested()):
            await self._body(statement.body)

    async def _begin(self, statement: Begin) -> None:
        async with self._entered(self._db.session.begin()):
            await self._body(statement.body)

    async def _scope(self, scope: Scope) -> None:
        with self._told(f"scope {scope.id}"):
            async with self._entered(self._db.session_scope(mode=scope.mode)):
                await self._body(scope.body)

    async def _block(self, block: Block) -> None:
        with self._told(f"{block.propagation} {block.id}"):
            transactional = self._blocks.get(block)
            if not block.is_decorator:
                async with self._entered(transactional):
                    await self._body(block.body)
            elif self._is_sync:
                transactional(lambda: finish(self._body(block.body)))()
            else:

                @transactional
                async def decorated() -> None:
                    await self._body(block.body)

                await decorated()

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, Stop) as error:
            self.log.append(f"{name}: {describe(error)}")
            raise
        self.log.append(f"{name}: done")

    async def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        answer = method(*arguments)
        return await answer if inspect.isawaitable(answer) else answer

    @asynccontextmanager
    async def _entered(self, block: Any) -> AsyncIterator[None]:
        if self._is_sync:
            with block:
                yield
        else:
            async with block:
                yield

    # ---------------------------------------------------------------- hooks

    async def _register(self, hook: Hook) -> None:
        register = getattr(self._db, f"on_{hook.on}")
        is_plain = self._is_sync or hook.is_plain
        function = self._plain(hook) if is_plain else self._coroutine(hook)
        before = set() if self._is_sync else asyncio.all_tasks()
        register(function, when=hook.when, on_error=hook.on_error)
        started = set() if self._is_sync else asyncio.all_tasks() - before
        if started and not self._is_in_plain_hook:  # it runs at once: one thing after the other
            await asyncio.wait(started)

    def _plain(self, hook: Hook) -> Callable[..., None]:
        def call(*outcome: Any) -> None:
            self._tell(hook, *outcome)
            outside, self._is_in_plain_hook = self._is_in_plain_hook, True
            try:
                finish(self._body(hook.body))
            finally:
                self._is_in_plain_hook = outside

        return call

    def _coroutine(self, hook: Hook) -> Callable[..., Coroutine[Any, Any, None]]:
        async def call(*outcome: Any) -> None:
            self._tell(hook, *outcome)
            await self._body(hook.body)

        return call

    def _tell(self, hook: Hook, *outcome: Any) -> None:
        self.log.append(" ".join([f"on_{hook.on} {hook.id}", *(each.name for each in outcome)]))
