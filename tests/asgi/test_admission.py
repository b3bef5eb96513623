"""`max_concurrent`: requests wait for their turn before they take a connection."""

import asyncio
import logging
from typing import Any

import pytest
import sqlalchemy as sa
from starlette.requests import Request

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    Retry,
    current_scope,
    current_session,
)
from asgi_dbscope._admission import Admission, AdmittedRequest, ReadAhead
from tests.fix_asgi import body, http_scope, respond, start
from tests.fix_database import Item

ONE = sa.text("SELECT 1")


class Counter:
    """An app that counts who is inside, and lets them go one after the other."""

    def __init__(self, db: Any) -> None:
        self.db = db
        self.order: list[str] = []
        self.inside = 0
        self.most = 0
        self.may_go = asyncio.Semaphore(0)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Use the session, and wait inside."""
        if scope["path"] == "/idle":
            await respond(send)
            return
        await self.work(scope["path"])
        await respond(send)

    async def work(self, path: str) -> None:
        """Use the session, and wait inside."""
        await self.db.session.execute(ONE)
        self.order.append(path)
        self.inside += 1
        self.most = max(self.most, self.inside)
        await self.may_go.acquire()
        self.inside -= 1


async def until(condition):
    """Wait until it is so."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("most", [1, 2])
async def test_no_more_than_so_many_are_inside_and_they_keep_their_order(db, drive, engine, most):
    """G14: those who wait hold no connection, and their turn comes in the order of their coming."""
    app = Counter(db)
    admitted = DBSessionMiddleware(app, database=db, max_concurrent=most)
    requests = []
    for number in range(6):
        requests.append(asyncio.create_task(drive(admitted, http_scope(f"/{number}"))))
        await until(lambda: len(app.order) == min(most, len(requests)))
        await asyncio.sleep(0.01)

    held = engine.pool.checkedout()
    for _ in requests:
        app.may_go.release()
    exchanges = await asyncio.gather(*requests)

    assert most == held
    assert most == app.most
    order = app.order if most == 1 else sorted(app.order)  # two run at the same time
    assert [f"/{number}" for number in range(6)] == order
    assert {200} == {each.status for each in exchanges}


async def test_request_without_a_session_never_waits(db, drive):
    """G5: who asks for no connection passes, however many wait."""
    app = Counter(db)
    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1)
    request = asyncio.create_task(drive(admitted, http_scope("/1")))
    await until(lambda: app.order)

    exchange = await drive(admitted, http_scope("/idle"))
    app.may_go.release()
    await request

    assert 200 == exchange.status


async def test_wait_is_bounded(db, drive, caplog):
    """G14: after `waiting_timeout` it is a 503 with Retry-After."""
    app = Counter(db)
    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1, waiting_timeout=0.05)
    request = asyncio.create_task(drive(admitted, http_scope("/1")))
    await until(lambda: app.order)

    with caplog.at_level(logging.WARNING, "asgi_dbscope"):
        exchange = await drive(admitted, http_scope("/2"))
    app.may_go.release()
    await request

    assert 503 == exchange.status
    assert (b"retry-after", b"1") in exchange.messages[0]["headers"]
    assert "it waited 0.05 seconds, and 1 requests are being served, 0 wait" in caplog.text


async def test_queue_is_bounded(db, drive):
    """G14: one more than `max_waiting` is a 503 at once; the others get their turn."""
    app = Counter(db)
    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1, max_waiting=1)
    requests = [asyncio.create_task(drive(admitted, http_scope(f"/{n}"))) for n in range(2)]
    await until(lambda: app.order)
    await asyncio.sleep(0.01)

    exchange = await drive(admitted, http_scope("/3"))
    app.may_go.release()
    app.may_go.release()
    await asyncio.gather(*requests)

    assert 503 == exchange.status
    assert ["/0", "/1"] == app.order


async def test_client_that_leaves_leaves_the_queue(db, drive):
    """G14: the place goes to somebody who is still there."""
    app = Counter(db)
    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1)
    first = asyncio.create_task(drive(admitted, http_scope("/1")))
    await until(lambda: app.order)
    gone = await drive(admitted, http_scope("/gone"), received=[{"type": "http.disconnect"}])
    last = asyncio.create_task(drive(admitted, http_scope("/2")))
    app.may_go.release()
    app.may_go.release()
    await asyncio.gather(first, last)

    assert 503 == gone.status
    assert ["/1", "/2"] == app.order


async def test_nothing_of_the_body_is_lost_to_the_look_ahead(db, drive):
    """G18: what came while the request waited is what its app receives, in order."""
    received = []
    chunks = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.request", "body": b"b", "more_body": True},
        {"type": "http.request", "body": b"c", "more_body": False},
    ]
    is_inside, may_go = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        if scope["path"] == "/read":
            received.append(await receive())
        await db.session.execute(ONE)
        if scope["path"] == "/hold":
            is_inside.set()
            await may_go.wait()
        else:
            received.append(await receive())
            received.append(await receive())
        await respond(send)

    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1)
    holder = asyncio.create_task(drive(admitted, http_scope("/hold")))
    await is_inside.wait()
    reader = asyncio.create_task(drive(admitted, http_scope("/read"), received=chunks))
    await asyncio.sleep(0.02)
    may_go.set()
    await asyncio.gather(holder, reader)

    assert chunks == received


async def test_place_is_given_back_with_the_head(db, drive):
    """G6: a slow body or a background task holds up nobody; nor does it wait for a turn itself."""
    is_sent, may_end = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        await db.session.execute(ONE)
        if scope["path"] == "/slow":
            await send(start(200))
            is_sent.set()
            await may_end.wait()
            await db.session.execute(ONE)
            await send(body())
            return
        await respond(send)

    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1, waiting_timeout=5)
    slow = asyncio.create_task(drive(admitted, http_scope("/slow")))
    await is_sent.wait()
    exchange = await drive(admitted, http_scope("/quick"))
    may_end.set()

    assert 200 == exchange.status
    assert (await slow).is_complete


@pytest.mark.parametrize("retry", [None, Retry()], ids=["once", "replayed"])
async def test_failing_requests_give_their_places_back(db, drive, retry):
    """G14: an error, a rollback or a cancellation loses no place."""

    async def app(scope, receive, send):
        await db.session.execute(ONE)
        if scope["path"] == "/raise":
            raise ZeroDivisionError
        if scope["path"] == "/cancel":
            raise asyncio.CancelledError
        if scope["path"] == "/commit":
            db.session.add(Item(id=1, note="x"))
            await db.session.commit()
        await respond(send, 500 if scope["path"] == "/500" else 200)

    admitted = DBSessionMiddleware(
        app, database=db, max_concurrent=1, waiting_timeout=0.5, retry=retry
    )
    for path in ("/raise", "/500", "/commit"):
        await drive(admitted, http_scope(path))
    await asyncio.wait([asyncio.create_task(drive(admitted, http_scope("/cancel")))])

    assert 200 == (await drive(admitted, http_scope("/"))).status


async def test_request_that_is_cancelled_in_the_queue_leaves_it(db, drive):
    """G10: cancelled while it waits, or in the moment of its turn, a request loses no place."""
    app = Counter(db)
    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1)
    first = asyncio.create_task(drive(admitted, http_scope("/1")))
    await until(lambda: app.order)
    waiting = [asyncio.create_task(drive(admitted, http_scope("/2"))) for _ in range(2)]
    await asyncio.sleep(0.02)
    waiting[0].cancel()
    app.may_go.release()
    await first
    waiting[1].cancel()
    await asyncio.wait(waiting)
    app.may_go.release()

    assert 200 == (await drive(admitted, http_scope("/3"))).status


async def test_child_task_that_outlives_its_request_takes_no_place(engine, drive):
    """G22: a turn that comes when the request is over goes to the next one."""
    db = Database(engine, cleanup_timeout=0.05)
    counter = Counter(db)
    children: list[asyncio.Task[Any]] = []

    async def app(scope, receive, send):
        if scope["path"] != "/leave":
            await counter(scope, receive, send)
            return
        children.append(asyncio.create_task(db.session.execute(ONE)))
        await asyncio.sleep(0)
        await respond(send)

    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1)
    first = asyncio.create_task(drive(admitted, http_scope("/1")))
    await until(lambda: counter.order)
    await drive(admitted, http_scope("/leave"))
    for _ in range(2):
        counter.may_go.release()
    await first
    await asyncio.wait(children)

    assert isinstance(children[0].exception(), Exception)
    assert 200 == (await drive(admitted, http_scope("/2"))).status


async def test_two_databases_of_one_request_take_one_place(make_engine, drive):
    """G14: it is requests that are counted, not sessions, also where two ask at the same time."""
    engines = [make_engine("sqlite", file=f"{name}.db") for name in "ab"]
    databases = [Database(each, name=f"db{n}") for n, each in enumerate(engines)]
    counter = Counter(databases[0])

    async def app(scope, receive, send):
        if scope["path"] == "/hold":
            await counter(scope, receive, send)
            return
        await asyncio.gather(*(each.session.execute(ONE) for each in databases))
        await respond(send)

    admitted = DBSessionMiddleware(app, databases=databases, max_concurrent=1, waiting_timeout=5)
    holder = asyncio.create_task(drive(admitted, http_scope("/hold")))
    await until(lambda: counter.order)
    waiting = asyncio.create_task(drive(admitted))
    await asyncio.sleep(0.02)
    counter.may_go.release()
    exchanges = [await holder, await waiting, await drive(admitted)]
    for each in engines:
        await each.dispose()

    assert [200] * 3 == [each.status for each in exchanges]


async def test_second_middleware_leaves_the_first_ones_request_alone(make_engine, db, drive):
    """G18: two instances for different databases have places of their own."""
    engine = make_engine("sqlite", file="other.db")
    other = Database(engine, name="other")

    async def app(scope, receive, send):
        await db.session.execute(ONE)
        await other.session.execute(ONE)
        await respond(send)

    inner = DBSessionMiddleware(app, database=other, max_concurrent=1)
    outer = DBSessionMiddleware(inner, database=db, max_concurrent=1)
    scope = http_scope("/")
    statuses = [(await drive(outer, scope)).status for _ in range(2)]
    await engine.dispose()

    assert [200, 200] == statuses
    assert "asgi_dbscope" not in scope


async def use(db: Any, way: str, work: Any) -> None:
    """Use a session in one of the ways that there are in a request."""
    if way == "session":
        await work()
    elif way == "session_scope":
        async with db.session_scope() as session:
            await session.execute(ONE)
            await work()
    elif way == "branch":
        async with db.branch():
            await work()
    elif way == "gather":
        await db.gather(work())
    else:
        async with db.transactional(propagation="REQUIRES_NEW"):
            await work()


@pytest.mark.parametrize("way", ["session", "session_scope", "branch", "gather", "REQUIRES_NEW"])
async def test_sessions_of_its_own_are_the_requests_too(db, drive, engine, way):
    """G14: a request waits for its turn whichever session it uses first, and only then."""
    counter = Counter(db)

    async def app(scope, receive, send):
        async def work():
            await counter.work(scope["path"])

        await use(db, way, work)
        await db.session.execute(ONE)  # a second connection, in its turn
        async with db.session_scope() as session:
            await session.execute(ONE)
        await respond(send)

    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1)
    requests = [asyncio.create_task(drive(admitted, http_scope(f"/{n}"))) for n in range(3)]
    await until(lambda: counter.order)
    await asyncio.sleep(0.02)
    held = engine.pool.checkedout()
    for _ in requests:
        counter.may_go.release()
    exchanges = await asyncio.gather(*requests)

    assert held <= 2  # a scope of its own, and the session in it
    assert 1 == counter.most
    assert {200} == {each.status for each in exchanges}


@pytest.mark.parametrize("way", ["hold", "session_scope"])
async def test_place_is_kept_as_long_as_a_connection_is(db, drive, way):
    """G14: with `stream="hold"`, or a block around the response, the place goes with its end."""
    is_sent, may_end = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        async def stream():
            await send(start(200))
            if scope["path"] == "/slow":
                is_sent.set()
                await may_end.wait()

        if way == "hold":
            db.scope.configure(stream="hold")
            await db.session.execute(ONE)
            await stream()
        else:
            async with db.session_scope() as session:
                await session.execute(ONE)
                await stream()
        await send(body())

    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1, max_waiting=0)
    slow = asyncio.create_task(drive(admitted, http_scope("/slow")))
    await is_sent.wait()
    refused = await drive(admitted)
    may_end.set()
    await slow

    assert 503 == refused.status
    assert 200 == (await drive(admitted)).status


@pytest.mark.parametrize("inside", [{}, {"max_concurrent": 5}], ids=["plain", "with its own"])
async def test_instance_inside_leaves_the_outer_ones_places_alone(make_engine, db, drive, inside):
    """G14: each instance counts the requests that use its own databases."""
    engine = make_engine("sqlite", file="other.db")
    other = Database(engine, name="other")
    counter = Counter(db)
    inner = DBSessionMiddleware(counter, database=other, **inside)
    admitted = DBSessionMiddleware(inner, database=db, max_concurrent=1)
    requests = [asyncio.create_task(drive(admitted, http_scope(f"/{n}"))) for n in range(3)]
    await until(lambda: counter.order)
    await asyncio.sleep(0.02)
    for _ in requests:
        counter.may_go.release()
    await asyncio.gather(*requests)
    await engine.dispose()

    assert 1 == counter.most


async def test_request_that_calls_its_own_app_does_not_wait_for_itself(db, drive):
    """G14: what is called in process from inside a place needs no second one."""
    inner = []

    async def app(scope, receive, send):
        await db.session.execute(ONE)
        if scope["path"] == "/outer":
            inner.append(await drive(admitted, http_scope("/inner")))
        await respond(send)

    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1, max_waiting=0)
    outer = await drive(admitted, http_scope("/outer"))

    assert [200, 200] == [outer.status, inner[0].status]
    assert 200 == (await drive(admitted)).status


async def test_asking_for_the_engine_alone_takes_no_place(db, drive):
    """G5: `get_bind()` outside of any operation waits for nothing."""

    async def app(scope, receive, send):
        assert isinstance(current_session().get_bind(), sa.Engine)
        await respond(send)

    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1)

    assert 200 == (await drive(admitted)).status


async def test_app_that_receives_while_it_is_looked_gets_the_message():
    """G18: a `receive` of the app's own goes first, and a message comes once."""
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    receive = ReadAhead(messages.get)
    watching = asyncio.create_task(receive.until_gone())
    await asyncio.sleep(0)
    receiving = [asyncio.create_task(receive()) for _ in range(2)]
    await asyncio.sleep(0)
    await messages.put({"type": "http.request", "body": b"a"})
    await messages.put({"type": "http.disconnect"})
    got = [(await each)["type"] for each in receiving]
    watching.cancel()
    receive.close()

    assert ["http.disconnect", "http.request"] == sorted(got)


async def test_message_that_was_looked_for_goes_to_the_app_that_asks():
    """G18: who is let in before anything came gets the very message that was waited for."""
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    receive = ReadAhead(messages.get)
    first = asyncio.create_task(receive.until_gone())
    await asyncio.sleep(0)
    first.cancel()
    receiving = asyncio.create_task(receive())
    await asyncio.sleep(0)
    again = asyncio.create_task(receive.until_gone())
    await asyncio.sleep(0)
    await messages.put({"type": "http.disconnect"})

    assert {"type": "http.disconnect"} == await receiving
    await asyncio.sleep(0)
    assert not again.done()
    again.cancel()
    receive.close()


async def test_app_that_only_looks_for_its_client_is_told_at_once():
    """G18: as Starlette's `is_disconnected()`, which is cancelled where it would have to wait."""
    leaves = asyncio.Event()

    async def receive():
        await leaves.wait()
        return {"type": "http.disconnect"}

    ahead = ReadAhead(receive)
    looking = asyncio.create_task(ahead.until_gone())
    await asyncio.sleep(0)
    looking.cancel()  # it has its turn
    request = Request(http_scope(), ahead)
    before = await request.is_disconnected()
    leaves.set()
    await asyncio.sleep(0)

    assert not before
    assert await request.is_disconnected()
    ahead.close()


async def test_turn_that_comes_after_the_response_is_the_next_ones(db):
    """G14: nobody would give back the place of a request that has answered without it."""
    admission = Admission(1, None, 10.0)
    never: Any = asyncio.Event().wait
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await admission.enter(ReadAhead(never), "GET /")
    request = AdmittedRequest(admission, never, send, None)
    async with db.session_scope():
        entering = asyncio.create_task(request.enter(current_scope()))
        await until(lambda: "1 waiting" in repr(admission))
        await request.send(start(200))
        admission.leave()
        await entering
    request.close()

    assert not request.is_inside
    assert "<Admission: 0 of 1 inside, 0 waiting>" == repr(admission)


async def test_state_shows():
    """What an admission is at can be seen."""
    admission = Admission(2, None, 1.0)
    await admission.enter(ReadAhead(asyncio.Event().wait), "GET /")  # type: ignore[arg-type]

    assert "<Admission: 1 of 2 inside, 0 waiting>" == repr(admission)


async def test_look_ahead_keeps_no_more_than_a_little():
    """G14: a large body is left where it is, and its client is not watched any more."""
    chunk = {"type": "http.request", "body": b"x" * 40000, "more_body": True}
    given = 0

    async def endless():
        nonlocal given
        given += 1
        return chunk

    receive = ReadAhead(endless)
    watching = asyncio.create_task(receive.until_gone())
    await asyncio.sleep(0.01)
    watching.cancel()

    assert 2 == given
    assert chunk is await receive()


@pytest.mark.parametrize(
    "message",
    [
        {"type": "http.request", "body": b"", "more_body": False},
        {"type": "http.request", "body": "text"},
        {"type": "http.request", "body": None},
        {"type": 5},
        None,
    ],
    ids=["nothing new", "body str", "body None", "type int", "none"],
)
async def test_message_that_says_nothing_is_no_clients_leaving(message):
    """G14, G18: a server that always has one, or a strange one, isn't asked for ever."""
    given = 0

    async def endless():
        nonlocal given
        given += 1
        return message

    receive = ReadAhead(endless)
    watching = asyncio.create_task(receive.until_gone())
    await asyncio.sleep(0.02)

    assert not watching.done()
    watching.cancel()
    assert 2 >= given
    assert message is await receive()


async def test_app_that_is_receiving_is_not_disturbed():
    """G18: where the app waits for a message itself, nobody else takes it."""
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    receive = ReadAhead(messages.get)
    receiving = asyncio.create_task(receive())
    await asyncio.sleep(0)
    watching = asyncio.create_task(receive.until_gone())
    await asyncio.sleep(0)
    await messages.put({"type": "http.disconnect"})

    assert "http.disconnect" == (await receiving)["type"]
    assert not watching.done()
    watching.cancel()
    receive.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_concurrent": 0}, "max_concurrent must be a whole number"),
        ({"max_concurrent": True}, "max_concurrent must be a whole number"),
        ({"max_concurrent": 1, "max_waiting": -1}, "max_waiting must be a whole number"),
        ({"max_concurrent": 1, "waiting_timeout": None}, "waiting_timeout must be a number of sec"),
        ({"max_concurrent": 1, "waiting_timeout": 0}, "waiting_timeout must be a number"),
    ],
)
def test_numbers_are_checked(options, message):
    """A wrong number is found when the app is built."""
    with pytest.raises(ConfigurationError, match=message):
        DBSessionMiddleware(Counter(None), database=Database("sqlite+aiosqlite://"), **options)


def test_synchronous_database_is_refused(make_sync_engine):
    """Who waits would hold a thread; the message says what limits there."""
    engine = make_sync_engine("sqlite")
    with pytest.raises(ConfigurationError, match="default_thread_limiter"):
        DBSessionMiddleware(Counter(None), engine=engine, max_concurrent=1)
