"""Starlette's BaseHTTPMiddleware, around us and inside: it runs the app in a task of its own."""

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import sqlalchemy as sa
import starlette
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from asgi_dbscope import DBSessionMiddleware, current_session
from tests.fix_asgi import http_scope
from tests.fix_database import Child, Item
from tests.fix_frameworks import answering_disconnect

STARLETTE = tuple(int(part) for part in starlette.__version__.split(".")[:2])

WARNING = "is a BaseHTTPMiddleware inside DBSessionMiddleware"

Place = Callable[..., Any]


class Passing(BaseHTTPMiddleware):
    """Does what most of them do; remembers the sessions it saw."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self.app = app

    async def dispatch(self, request: Request, call_next: Any) -> Any:
        sessions = request.app.state.sessions
        if request.app.state.is_inside:
            sessions.append(current_session())
        response = await call_next(request)
        if request.app.state.is_inside:
            sessions.append(current_session())
        return response


def outside(app: Starlette, **options: Any) -> Any:
    """Us inside of it."""
    app.state.is_inside, app.state.sessions = False, []
    app.add_middleware(DBSessionMiddleware, **options)
    app.add_middleware(Passing)
    return answering_disconnect(app)


def inside(app: Starlette, **options: Any) -> Any:
    """Us around it."""
    app.state.is_inside, app.state.sessions = True, []
    app.add_middleware(Passing)
    app.add_middleware(DBSessionMiddleware, **options)
    return answering_disconnect(app)


@pytest.fixture(params=[inside, outside])
def place(request: pytest.FixtureRequest) -> Place:
    """Install the middleware, and a BaseHTTPMiddleware on that side of it."""
    way: Place = request.param
    return way


def app_of(endpoint: Any) -> Starlette:
    """An app with one endpoint at `/`."""
    return Starlette(routes=[Route("/", endpoint)])


pytestmark = pytest.mark.filterwarnings(f"ignore:.*{WARNING}:UserWarning")


@pytest.fixture(autouse=True)
async def old_streams_are_collected() -> AsyncIterator[None]:
    """Collect within the test what old versions of it leave unclosed."""
    yield
    if STARLETTE < (0, 41):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        for _ in range(3):  # a collected generator is closed by a task
            await asyncio.sleep(0)


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_one_session_on_either_side(sync, db, place, drive, rows, timeline):
    """G11, G1: endpoint and middleware share one session; it is committed before the head."""

    def create(request: Request) -> Response:
        request.app.state.sessions.append(current_session())
        current_session().add(Item(id=1))
        return Response(status_code=201)

    async def create_async(request: Request) -> Response:
        await asyncio.gather(asyncio.to_thread(lambda: None))
        return create(request)

    app = app_of(create if sync else create_async)
    exchange = await drive(place(app, database=db))

    assert (201, None) == (exchange.status, exchange.error)
    assert 1 == len(set(map(id, app.state.sessions)))
    assert ["checkout", "begin", "commit", "checkin", "start 201"] == timeline[:5]
    assert [1] == await rows()


async def test_raised_4xx_rolls_back_on_either_side(db, place, drive, rows):
    """G3: hidden or not, an HTTPException that was raised is rolled back."""

    async def fail(request: Request) -> Response:
        current_session().add(Item(id=1))
        await current_session().flush()
        raise HTTPException(404)

    exchange = await drive(place(app_of(fail), database=db))

    assert (404, None) == (exchange.status, exchange.error)
    assert [] == await rows()


@pytest.mark.parametrize(("where", "expected"), [(inside, []), (outside, [1])])
async def test_returned_4xx_is_taken_for_raised_behind_it(where, expected, db, drive, rows):
    """G3: behind an inner one nobody can tell; outside of us it changes nothing."""

    async def answer(request: Request) -> Response:
        current_session().add(Item(id=1))
        return JSONResponse({}, status_code=404)

    exchange = await drive(where(app_of(answer), database=db))

    assert 404 == exchange.status
    assert expected == await rows()


async def test_unhandled_error_rolls_back(db, place, drive, rows):
    """G3: the error passes through both; the client gets the 500 after the rollback."""

    async def fail(request: Request) -> Response:
        current_session().add(Item(id=1))
        await current_session().flush()
        raise LookupError

    exchange = await drive(place(app_of(fail), database=db))

    assert 500 == exchange.status
    assert isinstance(exchange.error, LookupError)
    assert [] == await rows()


@pytest.mark.parametrize("handled", [False, True], ids=["unhandled", "handled"])
async def test_failed_commit_is_never_a_success(handled, db, place, drive, rows):
    """G2: no head of the app's goes out, its background task doesn't run, its handler renders."""
    ran: list[str] = []

    async def create(request: Request) -> Response:
        await current_session().execute(sa.insert(Child).values(id=1, item_id=404))
        return Response(status_code=201, background=BackgroundTask(ran.append, "background"))

    async def render(request: Request, error: Exception) -> Response:
        return PlainTextResponse("mine", status_code=409)

    app = app_of(create)
    if handled:
        app.add_exception_handler(sa.exc.IntegrityError, render)
    exchange = await drive(place(app, database=db))

    if handled:
        assert (409, b"mine", None) == (exchange.status, exchange.body, exchange.error)
    else:
        assert 500 == exchange.status
        assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert ([], []) == (ran, await rows())


def stream_of(*lines: Any, background: Any = None, first: int | None = None) -> Any:
    """An endpoint whose body awaits each of *lines* with the session, one chunk for each."""

    async def statement(request: Request) -> Response:
        session = current_session()
        if first is not None:
            session.add(Item(id=first))

        async def body() -> AsyncIterator[str]:
            for line in lines:
                await line(session)
                yield "line\n"

        task = BackgroundTask(background, session) if background else None
        return StreamingResponse(body(), background=task)

    return statement


def writing(item_id: int) -> Any:
    """Write a row."""

    async def write(session: Any) -> None:
        session.add(Item(id=item_id))
        await session.flush()

    return write


async def fail_at_commit(session: Any) -> None:
    """Write what only COMMIT refuses."""
    await session.execute(sa.insert(Child).values(id=1, item_id=404))


async def test_stream_and_background_are_committed(db, place, drive, rows, timeline):
    """G1, G7, G8: each at its own end, also in the task that the middleware runs the app in."""
    endpoint = stream_of(writing(2), writing(3), first=1, background=writing(4))

    exchange = await drive(place(app_of(endpoint), database=db))

    assert (b"line\nline\n", True, None) == (
        exchange.body,
        exchange.is_complete,
        exchange.error,
    )
    happened = [each for each in timeline if each in {"commit", "start 200", "last body"}]
    assert ["commit", "start 200", "commit"] == happened[:3]
    assert [1, 2, 3, 4] == await rows()


async def test_torn_stream_behind_us(db, drive, rows):
    """G7: with the middleware inside, a body whose commit fails has no clean end."""
    endpoint = stream_of(writing(1), fail_at_commit)

    exchange = await drive(inside(app_of(endpoint), database=db))

    assert (200, b"line\nline\n", False) == (
        exchange.status,
        exchange.body,
        exchange.is_complete,
    )
    assert isinstance(exchange.error, sa.exc.IntegrityError)


async def test_torn_stream_behind_it(db, drive, rows):
    """G7: outside of us it ends any torn body cleanly; nothing stays, the error surfaces."""
    endpoint = stream_of(writing(1), fail_at_commit)

    exchange = await drive(outside(app_of(endpoint), database=db))

    assert (200, b"line\nline\n") == (exchange.status, exchange.body)
    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == await rows()


async def test_body_that_starts_before_the_head_is_sent_belongs_to_the_response(db, drive, rows):
    """G2: inside, the body's first chunk is made before the head: its failed commit is a 500."""
    endpoint = stream_of(fail_at_commit, first=1)

    exchange = await drive(inside(app_of(endpoint), database=db))

    assert (500, b"Internal Server Error") == (exchange.status, exchange.body)
    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == await rows()


async def test_disconnect_in_mid_stream_rolls_the_body_back(engine, db, place, drive, rows):
    """G7: the client leaves; what the stream wrote is gone, and no connection is held."""
    gone = asyncio.Event()

    async def nothing(session: Any) -> None: ...

    async def write_and_wait(session: Any) -> None:
        await writing(2)(session)
        gone.set()
        await asyncio.Event().wait()

    served = place(app_of(stream_of(nothing, nothing, write_and_wait, first=1)), database=db)

    async def leaving(scope: Any, receive: Any, send: Any) -> None:
        async def receive_disconnect() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        await served(scope, receive_disconnect, send)

    exchange = await drive(leaving)

    assert (200, b"line\nline\n") == (exchange.status, exchange.body)
    assert [1] == await rows()
    assert 0 == engine.pool.checkedout()


async def test_response_of_its_own_in_place_of_the_endpoints(db, drive, rows):
    """G1, G3: what the inner middleware answers itself decides: a 200 in place of a 404."""

    async def answer(request: Request) -> Response:
        current_session().add(Item(id=1))
        return JSONResponse({}, status_code=404)

    async def replace(request: Request, call_next: Any) -> Response:
        await call_next(request)
        current_session().add(Item(id=2))
        return PlainTextResponse("replaced")

    app = app_of(answer)
    app.add_middleware(BaseHTTPMiddleware, dispatch=replace)
    app.add_middleware(DBSessionMiddleware, database=db)

    exchange = await drive(answering_disconnect(app))

    assert (200, b"replaced") == (exchange.status, exchange.body)
    assert [1, 2] == await rows()


# --------------------------------------------------------------------------------------
# The warning
# --------------------------------------------------------------------------------------


async def answer_404(request: Request) -> Response:
    """Return a 404, with a row."""
    current_session().add(Item(id=1))
    return JSONResponse({}, status_code=404)


async def test_warns_once_when_the_middleware_is_built(db, drive):
    """G3: the app's first request builds its middleware, and names the culprit; then no more."""
    served = inside(app_of(answer_404), database=db)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await drive(served)
        await drive(served)

    (warning,) = [each for each in caught if each.category is UserWarning]
    assert f"Passing {WARNING}" in str(warning.message)


@pytest.mark.filterwarnings("error")
async def test_warns_of_none_where_there_is_none_inside(db, drive, rows):
    """G18: outside of us, or not there at all, it is no reason to warn."""
    plain = app_of(answer_404)
    plain.add_middleware(DBSessionMiddleware, database=db)
    for served in (
        outside(app_of(answer_404), database=db),
        plain,
        DBSessionMiddleware(app_of(answer_404), database=db),
    ):
        async with db.session_scope() as session:
            await session.execute(sa.delete(Item))
        assert (404, None) == ((await drive(served)).status, None)
        assert [1] == await rows()


async def test_app_wrapped_whole_that_has_one_warns_at_once(db):
    """G3: it is in the app's list already, though the app hasn't built it yet."""
    app = app_of(answer_404)
    app.add_middleware(Passing)

    with pytest.warns(UserWarning, match=f"Passing {WARNING}"):
        DBSessionMiddleware(app, database=db)


async def test_app_wrapped_whole_that_gets_one_later_is_told_at_its_first_4xx(db, drive, rows):
    """G3: added after wrapping, it is found where it matters, and the 4xx is rolled back."""
    app = app_of(answer_404)
    app.state.is_inside, app.state.sessions = True, []
    served = DBSessionMiddleware(app, database=db)
    app.add_middleware(Passing)

    with pytest.warns(UserWarning, match=f"Passing {WARNING}"):
        exchange = await drive(answering_disconnect(served))

    assert 404 == exchange.status
    assert [] == await rows()


@pytest.mark.parametrize("returned", [True, False])
async def test_one_in_a_part_of_the_app_hides_there(db, drive, rows, returned):
    """G3: in a mount's own middleware it hides what was raised just as well, and is told of."""

    async def endpoint(request: Request) -> Response:
        current_session().add(Item(id=1))
        if returned:
            return JSONResponse({}, status_code=404)
        raise HTTPException(404)

    part = Mount("/part", routes=[Route("/", endpoint)], middleware=[Middleware(Passing)])
    app = Starlette(routes=[part])
    app.state.is_inside, app.state.sessions = True, []
    app.add_middleware(DBSessionMiddleware, database=db)

    with pytest.warns(UserWarning, match=f"Passing {WARNING}"):
        exchange = await drive(answering_disconnect(app), http_scope("/part/"))

    assert 404 == exchange.status
    assert [] == await rows()


@pytest.mark.parametrize("level", ["mount", "route"])
async def test_one_of_a_mounted_app_or_around_a_route_hides_there(level, db, drive, rows):
    """G3: in a mounted app, or a route's own middleware, a raised 4xx is rolled back, too."""

    async def fail(request: Request) -> Response:
        current_session().add(Item(id=1))
        await current_session().flush()
        raise HTTPException(404)

    async def passing(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    part = Starlette(routes=[Route("/", fail)])
    part.add_middleware(BaseHTTPMiddleware, dispatch=passing)
    route: Any = (
        Mount("/part", part)
        if level == "mount"
        else Route("/part/", BaseHTTPMiddleware(app_of_part(fail), dispatch=passing))
    )
    app = Starlette(routes=[route])
    app.add_middleware(DBSessionMiddleware, database=db)

    exchange = await drive(answering_disconnect(app), http_scope("/part/"))

    assert (404, None) == (exchange.status, exchange.error)
    assert [] == await rows()


def app_of_part(endpoint: Any) -> Starlette:
    """An app with one endpoint at `/part/`."""
    return Starlette(routes=[Route("/part/", endpoint)])
