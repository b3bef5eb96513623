"""Apps and servers that don't keep to ASGI: nothing hangs, leaks, or is committed by mistake.

`DBSCOPE_TEST_PROGRAMS=20000` asks for more random programs, and for new ones at each run.
"""

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    MalformedMessageError,
    NoSessionScopeError,
    Retry,
    _current,
)
from tests.fix_asgi import body, http_scope, start
from tests.fix_database import Item
from tests.malformed import (
    AppError,
    Model,
    Program,
    Rules,
    ServerError,
    Step,
    kind_of,
    programs,
)
from tests.messages import (
    BODIES,
    FIELD_MESSAGES,
    HEADS,
    MALFORMED_BODIES,
    MALFORMED_HEADS,
    RECEIVED,
    STRANGE,
    TRAILERS,
)

# Once an endpoint has a retry, an app gets copies of its `http.request`.
pytestmark = pytest.mark.usefixtures("forget_endpoints")

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
    retry: Retry | None
    first: int
    log: list[str] = field(default_factory=list)
    at_heads: list[list[int]] = field(default_factory=list)
    error: str | None = None

    def __post_init__(self) -> None:
        self._rules = Rules(self.program.has_extensions)
        self._names: dict[int, str] = {}
        self._received: Any = None

    async def run(self) -> None:
        """Run it to its end, as a server does."""
        extensions: dict[str, Any] = {}
        if self.program.has_extensions:
            kinds = ("trailers", "pathsend", "zerocopysend")
            extensions.update({f"http.response.{kind}": {} for kind in kinds})
        wrapped = DBSessionMiddleware(self._app, database=self.db, retry=self.retry)
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
                got = await receive()
                is_copy = self.retry is not None and kind_of(got) == "http.request"
                assert self._received is got or (is_copy and self._received == got)
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
def retry() -> Retry | None:
    """Whether a request could be replayed; none here meets a conflict."""
    return None


@pytest.fixture
def compare(source: Any, observer: sa.Connection, loop: Loop, retry: Retry | None) -> Compare:
    """Run a program, and assert that all which came of it is as the model says."""
    db = Database(source)
    firsts = itertools.count(step=SPAN)

    def compare(program: Program) -> None:
        model = Model(program, is_replayable=retry is not None)
        run = Run(program, db, observer, retry, first=next(firsts))
        loop.run_until_complete(run.run())

        assert model.log == run.log
        assert model.error == run.error
        assert model.at_heads == run.at_heads
        assert model.committed == committed(observer, run.first)
        assert 0 == checked_out(source)
        assert set() == asyncio.all_tasks(loop)
        assert _current.innermost.get() is None

    return compare


@pytest.mark.parametrize("retry", [None, Retry()], ids=["once", "retry"])
@pytest.mark.once
def test_random_programs_commit_what_was_understood(compare):
    """G1, G3, G7, G18: whatever an app sends, and whoever objects, a simple model knows the end."""
    FEW(given(programs())(compare))()


WRITE, READ = Step("write"), Step("read")
OK, LAST = Step("send", HEADS["200"], "200"), Step("send", BODIES["last"], "last")
BEFORE_TRAILERS = (Step("send", HEADS["trailers"], "trailers"), WRITE, LAST)
MOMENTS = {
    "before the head": ((WRITE,), (WRITE, OK, LAST)),
    "before the head, after a read": ((READ,), (OK, LAST)),
    "with nothing open": ((), (WRITE, OK, WRITE, LAST)),
    "in the body": ((OK, WRITE), (WRITE, LAST)),
    "after the end": ((OK, LAST, WRITE), (OK, LAST)),
    "before the trailers": (BEFORE_TRAILERS, (WRITE,)),
}
"""What an app does before and after it sends one message of the tables."""


@pytest.mark.parametrize("source", ["asyncpg"], indirect=True)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.once
def test_every_message_at_every_moment(compare, moment):
    """G1, G3, G7, G18: there is no message that commits, hangs or leaks at the wrong time."""
    before, after = MOMENTS[moment]
    tables = {**HEADS, **MALFORMED_HEADS, **BODIES, **MALFORMED_BODIES, **TRAILERS}
    sent = [Step("send", make, name) for name, make in (tables | STRANGE).items()]
    received = [Step("receive", make, name) for name, make in RECEIVED.items()]
    is_strict = moment in {"with nothing open", "in the body", "after the end"}
    for step in [*sent, *received]:
        compare(Program((*before, step, *after), True, is_strict, True))


DECISIVE = {
    "http.response.start": (WRITE,),
    "http.response.trailers": BEFORE_TRAILERS,
    "http.response.body": (OK, WRITE),
    "http.response.pathsend": (OK, WRITE),
    "http.response.zerocopysend": (OK, WRITE),
}
"""What an app does before a message of each type that ends its transaction."""


@pytest.mark.parametrize("source", ["sqlite"], indirect=True)
def test_every_field_left_out_or_wrong(compare):
    """G1, G7: no field of a message can be missing, or of a wrong type, and something commits."""
    for name, make in FIELD_MESSAGES.items():
        before = DECISIVE[name.partition(",")[0]]
        compare(Program((*before, Step("send", make, name)), False, False, True))


# --------------------------------------------------------------------------------------
# Messages sent at the same time
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["aiosqlite", "asyncpg"], indirect=True)
def test_messages_sent_at_the_same_time(source, observer, loop):
    """G1, G18: whichever comes first, no head of a success goes out before its commit."""
    db = Database(source)
    firsts = itertools.count(step=SPAN)
    sends = [Step("send", make, name) for name, make in (HEADS | BODIES | STRANGE).items()]
    sends += [Step("send", MALFORMED_HEADS[name], name) for name in ("status str", "headers None")]

    @FEW
    @given(st.lists(st.sampled_from(sends), min_size=2, max_size=6), st.booleans())
    def check(steps: list[Step], is_strict: bool) -> None:
        first = next(firsts)
        rules, names = Rules(has_extensions=False), dict[int, str]()
        seen: list[tuple[object, list[int]]] = []

        async def send(message: Any) -> None:
            if kind_of(message) == "http.response.start" and not seen:
                seen.append((message["status"], committed(observer, first)))
            if is_strict:
                rules.check(message, names)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await db.session.execute(sa.insert(Item).values(id=first))
            messages = [(step.make(), step.name) for step in steps if step.make]
            names.update({id(message): name for message, name in messages})
            await asyncio.gather(*(send(each) for each, _ in messages), return_exceptions=True)

        async def run() -> None:
            async with asyncio.timeout(PATIENCE):
                with contextlib.suppress(MalformedMessageError, ServerError):
                    wrapped = DBSessionMiddleware(app, database=db)
                    await wrapped(http_scope(), asyncio.Event().wait, send)

        loop.run_until_complete(run())

        is_success = bool(seen) and isinstance(seen[0][0], int) and seen[0][0] < 500
        assert committed(observer, first) == ([0] if is_success else [])
        assert not seen or seen[0][1] == committed(observer, first)
        assert 0 == checked_out(source)
        assert set() == asyncio.all_tasks(loop)

    check()


# --------------------------------------------------------------------------------------
# Scopes, and what is logged of them
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"method": None, "path": None}, "None None"),
        ({"method": b"GET", "path": b"/a\n"}, r"b'GET' b'/a\n'"),
        ({"path": 5, "headers": None, "state": None, "extensions": None}, "GET 5"),
        ({"path": "/a\r\n2026 ERROR forged\x1b[31m\u202e"}, "GET " + r"/a\r\n2026 ERROR forged"),
        ({"path": "/\ud800"}, r"GET /\ud800"),
        ({"path": "/" * 65536, "method": "X" * 65536}, "X" * 200 + "..."),
    ],
    ids=["None", "bytes", "others", "forged", "surrogate", "long"],
)
async def test_scope_of_odd_values_is_served_and_logged_on_a_line(db, rows, caplog, change, label):
    """A path writes no line of its own into the log, and its type is the app's business."""
    caplog.set_level(logging.DEBUG, "asgi_dbscope")
    answers = []

    async def send(message: Any) -> None:
        answers.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        db.session.add(Item(id=1))
        await send(start(200, trailers=True))
        db.session.add(Item(id=2))
        await send(body())
        db.session.add(Item(id=1))

    wrapped = DBSessionMiddleware(app, database=db, exclude=["/health", "/static/*"])
    await wrapped({**http_scope(), **change}, asyncio.Event().wait, send)

    assert [1, 2] == await rows()
    assert 2 == len(answers)
    assert any(
        line.endswith("work after the response was not committed") for line in caplog.messages
    )
    for line in caplog.messages:
        assert line.startswith(label)
        assert line.isprintable()
        assert 400 >= len(line)


@pytest.mark.parametrize("missing", ["method", "path", "headers", "type", "asgi"])
async def test_scope_with_a_missing_key_is_served(db, drive, missing):
    """What the server left out is missed by nobody but the app."""
    scope = http_scope()
    del scope[missing]
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope))
        await send(start())
        await send(body())

    await drive(DBSessionMiddleware(app, database=db, exclude="/health*"), dict(scope))

    assert [scope] == [{key: each[key] for key in each if key != "asgi_dbscope"} for each in seen]


@pytest.mark.parametrize("kind", [None, 5, b"http", [], {}, "HTTP", "webtransport"])
async def test_scope_of_another_type_has_no_session(db, kind):
    """G17: what isn't called http isn't taken for it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(NoSessionScopeError):
            _ = db.session
        assert kind is scope["type"]
        assert "asgi_dbscope" not in scope

    await DBSessionMiddleware(app, database=db)({"type": kind}, None, None)
