"""Apps and servers that don't keep to ASGI: nothing hangs, leaks, or is committed by mistake.

`DBSCOPE_TEST_PROGRAMS=20000` asks for more random programs, and for new ones at each run.
"""

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import Database, DBSessionMiddleware, MalformedMessageError, _current
from tests.fix_asgi import http_scope
from tests.fix_database import Item
from tests.malformed import (
    BODIES,
    HEADS,
    MALFORMED_BODIES,
    MALFORMED_HEADS,
    RECEIVED,
    STRANGE,
    AppError,
    Model,
    Program,
    Rules,
    ServerError,
    Step,
    kind_of,
    programs,
)

EXAMPLES = os.environ.get("DBSCOPE_TEST_PROGRAMS")
"""How many programs to run, where somebody asked for it."""

FEW = settings(
    max_examples=int(EXAMPLES or 80),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

SPAN = 100
"""How many ids each program may use."""

PATIENCE = 20.0
"""Seconds after which a request counts as one that hangs."""

KINDS = {MalformedMessageError: "refused", ServerError: "server", AppError: "app"}

Loop = asyncio.AbstractEventLoop


@pytest.fixture
def loop() -> Iterator[Loop]:
    """An event loop to run program after program in."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(params=["aiosqlite", "asyncpg", "sqlite", "psycopg"])
def source(
    request: pytest.FixtureRequest, make_engine: Callable[..., AsyncEngine], loop: Loop
) -> Iterator[AsyncEngine | sa.Engine]:
    """An engine, asynchronous or synchronous, on an empty schema."""
    if request.param in {"sqlite", "psycopg"}:
        yield request.getfixturevalue("make_sync_engine")(request.param)
        return
    engine = make_engine("sqlite" if request.param == "aiosqlite" else request.param)
    yield engine
    loop.run_until_complete(engine.dispose())


@pytest.fixture
def observer(source: AsyncEngine | sa.Engine) -> Iterator[sa.Connection]:
    """A connection of its own that sees what is committed."""
    is_sqlite = source.dialect.name == "sqlite"
    engine = sa.create_engine(
        source.url.set(drivername="sqlite" if is_sqlite else "postgresql+psycopg"),
        isolation_level="AUTOCOMMIT",
    )
    with engine.connect() as connection:
        yield connection
        connection.execute(sa.delete(Item))
    engine.dispose()


@dataclass
class Run:
    """A program as it really runs.

    Attributes:
        first: The first of the ids that it may use.

        log: For each `send` and `raise` what the app gets.

        at_heads: What was committed when a head reached the server.

        error: What the server gets in the end.
    """

    program: Program
    db: Database[Any]
    observer: sa.Connection
    first: int
    log: list[str] = field(default_factory=list)
    at_heads: list[list[int]] = field(default_factory=list)
    error: str | None = None

    def __post_init__(self) -> None:
        self._rules = Rules(self.program.offers_trailers)
        self._names: dict[int, str] = {}
        self._received: Any = None

    async def run(self) -> None:
        """Run it to its end, as a server does."""
        extensions: dict[str, Any] = {}
        if self.program.offers_trailers:
            extensions["http.response.trailers"] = {}
        wrapped = DBSessionMiddleware(self._app, database=self.db)
        scope = http_scope(extensions=extensions)
        try:
            async with asyncio.timeout(PATIENCE):
                await wrapped(scope, self._receive, self._send)
        except (MalformedMessageError, ServerError, AppError) as error:
            self.error = KINDS[type(error)]

    async def _receive(self) -> Any:
        return self._received

    async def _send(self, message: Any) -> None:
        if kind_of(message) == "http.response.start":
            self.at_heads.append(committed(self.observer, self.first))
        if self.program.is_strict:
            self._rules.check(message, self._names)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        for number, step in enumerate(self.program.steps):
            if step.verb == "write":
                await self._execute(sa.insert(Item).values(id=self.first + number))
            elif step.verb == "read":
                await self._execute(sa.select(1))
            elif step.verb == "raise":
                self.log.append("app")
                raise AppError
            elif step.verb == "receive":
                assert step.make is not None
                self._received = step.make()
                assert self._received is await receive()
            else:
                assert step.make is not None
                message = step.make()
                self._names[id(message)] = step.name
                await self._send_as_app(send, message)

    async def _send_as_app(self, send: Any, message: Any) -> None:
        try:
            await send(message)
        except (MalformedMessageError, ServerError) as error:
            self.log.append(KINDS[type(error)])
            if not self.program.swallows:
                raise
        else:
            self.log.append("sent")

    async def _execute(self, statement: Any) -> None:
        session = self.db.session
        if self.db.is_sync:
            await anyio.to_thread.run_sync(session.execute, statement)
        else:
            await session.execute(statement)


def committed(observer: sa.Connection, first: int) -> list[int]:
    """The rows of a program that are there."""
    mine = sa.select(Item.id).where(Item.id.between(first, first + SPAN - 1)).order_by(Item.id)
    return [each - first for each in observer.scalars(mine)]


def checked_out(source: Any) -> int:
    """How many connections are in use."""
    count: int = source.pool.checkedout()
    return count


Compare = Callable[[Program], None]


@pytest.fixture
def compare(source: Any, observer: sa.Connection, loop: Loop) -> Compare:
    """Run a program, and assert that all which came of it is as the model says."""
    db = Database(source)
    firsts = itertools.count(step=SPAN)

    def compare(program: Program) -> None:
        model = Model(program)
        run = Run(program, db, observer, first=next(firsts))
        loop.run_until_complete(run.run())

        assert model.log == run.log
        assert model.error == run.error
        assert model.at_heads == run.at_heads
        assert model.committed == committed(observer, run.first)
        assert 0 == checked_out(source)
        assert set() == asyncio.all_tasks(loop)
        assert _current.innermost.get() is None

    return compare


def test_random_programs_commit_what_was_understood(compare):
    """G1, G3, G7, G18: whatever an app sends, and whoever objects, a simple model knows the end."""
    FEW(given(programs())(compare))()


WRITE, READ = Step("write"), Step("read")
OK, LAST = Step("send", HEADS["200"], "200"), Step("send", BODIES["last"], "last")
MOMENTS = {
    "before the head": ((WRITE,), (WRITE, OK, LAST)),
    "before the head, after a read": ((READ,), (OK, LAST)),
    "with nothing open": ((), (WRITE, OK, WRITE, LAST)),
    "in the body": ((OK, WRITE), (WRITE, LAST)),
    "after the end": ((OK, LAST, WRITE), (OK, LAST)),
    "before the trailers": ((Step("send", HEADS["trailers"], "trailers"), WRITE, LAST), (WRITE,)),
}
"""What an app does before and after it sends one message of the tables."""


@pytest.mark.parametrize("source", ["asyncpg"], indirect=True)
@pytest.mark.parametrize("moment", MOMENTS)
def test_every_message_at_every_moment(compare, moment):
    """G1, G3, G7, G18: there is no message that commits, hangs or leaks at the wrong time."""
    before, after = MOMENTS[moment]
    tables = {**HEADS, **MALFORMED_HEADS, **BODIES, **MALFORMED_BODIES}
    sent = [Step("send", make, name) for name, make in (tables | STRANGE).items()]
    received = [Step("receive", make, name) for name, make in RECEIVED.items()]
    for step in [*sent, *received]:
        for is_strict in (False, True):
            compare(Program((*before, step, *after), True, is_strict, True))
