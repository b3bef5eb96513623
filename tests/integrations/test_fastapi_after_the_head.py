"""FastAPI: what goes on after the response's head. Streams, background tasks, `yield` exits."""

import inspect
from collections.abc import AsyncIterator
from typing import Annotated, Any

import fastapi
import pytest
import sqlalchemy as sa
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import FileResponse, StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.background import BackgroundTask

from asgi_dbscope import StreamSessionError, current_scope, current_session, session_options
from tests.fix_asgi import http_scope
from tests.fix_database import Child, Item
from tests.fix_frameworks import added, innermost

VERSION = tuple(int(part) for part in fastapi.__version__.split(".")[:2])

# Where a dependency's exit runs. FastAPI up to 0.105: after the background tasks. Up to 0.117:
# before the response. From 0.118: after it; from 0.121 the dependency says which, by its scope.
SCOPES: list[dict[str, Any]] = [{}]
if "scope" in inspect.signature(Depends).parameters:
    SCOPES += [{"scope": "function"}, {"scope": "request"}]


async def count(session: AsyncSession) -> int:
    """How many items the session's transaction sees."""
    return await session.scalar(sa.select(sa.func.count()).select_from(Item)) or 0


# --------------------------------------------------------------------------------------
# Background tasks
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_background_task_commits_in_a_transaction_of_its_own(
    sync, db, install, drive, rows, timeline
):
    """G8: a background task, in the loop or in a thread, uses the session; it is committed."""
    app = FastAPI()

    async def receipt() -> None:
        current_session().add(Item(id=2))

    def receipt_in_thread() -> None:
        current_session().add(Item(id=2))

    @app.post("/")
    async def create(
        tasks: BackgroundTasks, session: Annotated[AsyncSession, Depends(db.get_session)]
    ) -> None:
        session.add(Item(id=1))
        tasks.add_task(receipt_in_thread if sync else receipt)

    exchange = await drive(install(app, database=db), http_scope("/", "POST"))

    transaction = ["checkout", "begin", "commit", "checkin"]
    assert [*transaction, "start 200", "last body", *transaction] == timeline
    assert [1, 2] == await rows()
    assert exchange.error is None


async def test_background_task_that_raises_is_rolled_back(db, install, drive, rows):
    """G8: what a background task wrote before it raised is gone; the response's work stays."""
    app = FastAPI()

    async def fail(session: AsyncSession) -> None:
        session.add(Item(id=2))
        await session.flush()
        raise LookupError

    @app.post("/")
    async def create(
        tasks: BackgroundTasks, session: Annotated[AsyncSession, Depends(db.get_session)]
    ) -> None:
        session.add(Item(id=1))
        tasks.add_task(fail, session)

    exchange = await drive(install(app, database=db), http_scope("/", "POST"))

    assert 200 == exchange.status
    assert isinstance(innermost(exchange.error), LookupError)
    assert [1] == await rows()


async def test_background_commit_that_fails_is_logged(db, install, drive, rows, caplog):
    """G8: nobody can be told any more: the log is, and the response stands."""
    app = FastAPI()

    async def fail(session: AsyncSession) -> None:
        await session.execute(sa.insert(Child).values(id=1, item_id=404))

    @app.post("/")
    async def create(
        tasks: BackgroundTasks, session: Annotated[AsyncSession, Depends(db.get_session)]
    ) -> None:
        session.add(Item(id=1))
        tasks.add_task(fail, session)

    exchange = await drive(install(app, database=db), http_scope("/", "POST"))

    assert (200, None) == (exchange.status, exchange.error)
    assert [1] == await rows()
    (record,) = [each for each in caplog.records if "asgi_dbscope" == each.name]
    assert "ERROR" == record.levelname
    assert "POST /" in record.getMessage()


async def test_raised_error_runs_no_background_task(db, install, drive, rows):
    """G3, G8: a raised HTTPException rolls back, and FastAPI drops the endpoint's tasks."""
    app = FastAPI()
    ran: list[str] = []

    @app.post("/")
    async def fail(
        tasks: BackgroundTasks, session: Annotated[AsyncSession, Depends(db.get_session)]
    ) -> None:
        session.add(Item(id=1))
        await session.flush()
        tasks.add_task(ran.append, "background")
        raise HTTPException(409)

    exchange = await drive(install(app, database=db), http_scope("/", "POST"))

    assert 409 == exchange.status
    assert ([], []) == (ran, await rows())


# --------------------------------------------------------------------------------------
# Streams
# --------------------------------------------------------------------------------------


async def test_stream_reads_and_writes_in_a_transaction_of_its_own(
    db, install, drive, rows, timeline
):
    """G6, G7: no connection at the head; the body's transaction is over before its last byte."""
    app = FastAPI()

    @app.get("/")
    async def statement(
        session: Annotated[AsyncSession, Depends(db.get_session)],
    ) -> StreamingResponse:
        session.add(Item(id=1))

        async def lines() -> AsyncIterator[str]:
            yield "head\n"
            yield f"{await count(session)}\n"
            session.add(Item(id=2))

        return StreamingResponse(lines())

    exchange = await drive(install(app, database=db))

    assert b"head\n1\n" == exchange.body
    assert [
        *("checkout", "begin", "commit", "checkin"),
        *("start 200", "body"),
        *("checkout", "begin", "body", "commit", "checkin"),
        "last body",
    ] == timeline
    assert [1, 2] == await rows()


async def test_stream_whose_commit_fails_ends_torn(db, install, drive, rows):
    """G7: the client never sees a clean end of a body whose transaction didn't commit."""
    app = FastAPI()
    ran: list[str] = []

    @app.get("/")
    async def statement(
        session: Annotated[AsyncSession, Depends(db.get_session)],
    ) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            session.add(Item(id=1))
            await session.execute(sa.insert(Child).values(id=1, item_id=404))
            yield "line\n"

        return StreamingResponse(lines(), background=BackgroundTask(ran.append, "background"))

    exchange = await drive(install(app, database=db))

    assert (200, b"line\n", False) == (exchange.status, exchange.body, exchange.is_complete)
    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert ([], []) == (ran, await rows())


async def test_stream_that_raises_is_rolled_back(db, install, drive, rows):
    """G7: an exception in mid-stream rolls back what the stream wrote, and nothing before."""
    app = FastAPI()

    @app.get("/")
    async def statement(
        session: Annotated[AsyncSession, Depends(db.get_session)],
    ) -> StreamingResponse:
        session.add(Item(id=1))

        async def lines() -> AsyncIterator[str]:
            session.add(Item(id=2))
            await session.flush()
            yield "line\n"
            raise LookupError

        return StreamingResponse(lines())

    exchange = await drive(install(app, database=db))

    assert (200, False) == (exchange.status, exchange.is_complete)
    assert isinstance(innermost(exchange.error), LookupError)
    assert [1] == await rows()


async def test_background_task_of_a_stream_has_the_third_transaction(
    db, install, drive, rows, timeline
):
    """G7, G8: response, body and background each commit at their own end, on one session."""
    app = FastAPI()

    @app.get("/")
    async def statement(
        session: Annotated[AsyncSession, Depends(db.get_session)],
    ) -> StreamingResponse:
        item = Item(id=1)
        session.add(item)

        async def lines() -> AsyncIterator[str]:
            item.note = "body"
            await session.flush()
            yield "line\n"

        async def after() -> None:
            item.note = "background"

        return StreamingResponse(lines(), background=BackgroundTask(after))

    await drive(install(app, database=db))

    assert ["commit", "start 200", "body", "commit", "last body", "commit"] == [
        each for each in timeline if each in {"commit", "start 200", "body", "last body"}
    ]
    async with db.session_scope() as session:
        assert "background" == await session.scalar(sa.select(Item.note))


@pytest.mark.skipif(VERSION < (0, 134), reason="FastAPI has no generator endpoints before 0.134")
@pytest.mark.parametrize("kind", ["jsonl", "sse"])
async def test_generator_endpoint_streams_from_the_session(kind, db, install, drive, rows):
    """G7: a generator endpoint (JSON lines, server-sent events) writes, and is committed."""
    from fastapi.sse import EventSourceResponse

    app = FastAPI()
    options: dict[str, Any] = {"response_class": EventSourceResponse} if kind == "sse" else {}

    @app.get("/", **options)
    async def numbers(
        session: Annotated[AsyncSession, Depends(db.get_session)],
    ) -> AsyncIterator[int]:
        for number in (1, 2):
            session.add(Item(id=number))
            yield await count(session)

    exchange = await drive(install(app, database=db))

    assert (200, None) == (exchange.status, exchange.error)
    assert {"jsonl": b"1\n2\n", "sse": b"data: 1\n\ndata: 2\n\n"}[kind] == exchange.body
    assert exchange.is_complete
    assert [1, 2] == await rows()


async def test_stream_that_holds_keeps_the_responses_transaction(
    db, install, drive, rows, timeline
):
    """G7: under `stream="hold"` one transaction spans the endpoint and the body."""
    app = FastAPI()

    @app.get("/")
    @session_options(stream="hold")
    async def statement(
        session: Annotated[AsyncSession, Depends(db.get_session)],
    ) -> StreamingResponse:
        session.add(Item(id=1))
        await session.flush()
        found = await session.stream_scalars(sa.select(Item.id))

        async def lines() -> AsyncIterator[str]:
            async for each in found:
                yield f"{each}\n"

        return StreamingResponse(lines())

    exchange = await drive(install(app, database=db))

    assert b"1\n" == exchange.body
    assert [
        *("checkout", "begin", "start 200", "body", "commit", "checkin", "last body")
    ] == timeline
    assert [1] == await rows()


async def test_stream_that_may_not_use_the_session(db, install, drive, rows):
    """G7: under `stream="error"` the body's first use is refused, and the body ends torn."""
    app = FastAPI()

    @app.get("/")
    async def statement(
        session: Annotated[AsyncSession, Depends(db.get_session)],
    ) -> StreamingResponse:
        session.add(Item(id=1))

        async def lines() -> AsyncIterator[str]:
            yield f"{await count(session)}\n"

        return StreamingResponse(lines())

    exchange = await drive(install(app, database=db, stream="error"))

    assert (200, False) == (exchange.status, exchange.is_complete)
    assert isinstance(innermost(exchange.error), StreamSessionError)
    assert [1] == await rows()


@pytest.mark.skipif(
    "http.response.pathsend" not in inspect.getsource(FileResponse),
    reason="Starlette has no pathsend before 0.40",
)
async def test_file_by_pathsend_is_sent_after_the_commit(
    db, install, drive, rows, timeline, tmp_path
):
    """G1, G18: a FileResponse's pathsend message follows the committed head untouched."""
    app = FastAPI()
    (tmp_path / "file").write_text("content")
    path = str(tmp_path / "file")
    outcomes = []

    async def log() -> None:
        outcomes.append(current_scope().outcome.name)
        current_session().add(Item(id=2))

    @app.get("/")
    async def download(session: Annotated[AsyncSession, Depends(db.get_session)]) -> FileResponse:
        session.add(Item(id=1))
        return FileResponse(path, background=BackgroundTask(log))

    served = install(app, database=db)
    exchange = await drive(served, http_scope("/", extensions={"http.response.pathsend": {}}))

    assert {"type": "http.response.pathsend", "path": path} == exchange.messages[-1]
    transaction = ["checkout", "begin", "commit", "checkin"]
    assert [*transaction, "start 200", "pathsend", *transaction] == timeline
    assert ["COMMITTED"] == outcomes
    assert [1, 2] == await rows()


# --------------------------------------------------------------------------------------
# Dependencies with `yield`
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES, ids=str)
async def test_block_of_a_yield_dependency_is_open_across_the_head(
    scope, db, drive, rows, timeline
):
    """G1: the user's own `session.begin()` around the endpoint is committed before the head."""
    app = FastAPI()

    async def transaction() -> AsyncIterator[AsyncSession]:
        async with db.session.begin():
            yield db.session

    @app.post("/")
    async def create(
        session: Annotated[AsyncSession, Depends(transaction, **scope)],
    ) -> None:
        session.add(Item(id=1))

    exchange = await drive(added(app, database=db), http_scope("/", "POST"))

    assert (200, None) == (exchange.status, exchange.error)
    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == timeline
    assert [1] == await rows()


@pytest.mark.parametrize("scope", SCOPES, ids=str)
async def test_block_of_a_yield_dependency_is_rolled_back_when_the_endpoint_raises(
    scope, db, drive, rows
):
    """G3: the user's own block and a raised HTTPException: nothing stays, whoever rolls back."""
    app = FastAPI()

    async def transaction() -> AsyncIterator[AsyncSession]:
        async with db.session.begin():
            yield db.session

    @app.post("/")
    async def create(
        session: Annotated[AsyncSession, Depends(transaction, **scope)],
    ) -> None:
        session.add(Item(id=1))
        await session.flush()
        raise HTTPException(409)

    exchange = await drive(added(app, database=db), http_scope("/", "POST"))

    assert (409, None) == (exchange.status, exchange.error)
    assert [] == await rows()


@pytest.mark.parametrize("scope", SCOPES, ids=str)
async def test_block_of_a_yield_dependency_whose_commit_fails(scope, db, drive, rows):
    """G2: a commit that fails is no success, whether the user's block or the head asked for it."""
    app = FastAPI()

    async def transaction() -> AsyncIterator[AsyncSession]:
        async with db.session.begin():
            yield db.session

    @app.post("/")
    async def create(
        session: Annotated[AsyncSession, Depends(transaction, **scope)],
    ) -> None:
        session.add(Item(id=1))
        await session.execute(sa.insert(Child).values(id=1, item_id=404))

    exchange = await drive(added(app, database=db), http_scope("/", "POST"))

    assert exchange.status in {None, 500}
    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == await rows()


@pytest.mark.parametrize("scope", SCOPES, ids=str)
async def test_yield_dependencys_exit_may_write(scope, db, drive, rows):
    """G8: what a dependency writes after its `yield` is committed, before or after the head."""
    app = FastAPI()

    async def audited() -> AsyncIterator[AsyncSession]:
        yield db.session
        db.session.add(Item(id=2))

    @app.post("/")
    async def create(
        session: Annotated[AsyncSession, Depends(audited, **scope)],
    ) -> None:
        session.add(Item(id=1))

    exchange = await drive(added(app, database=db), http_scope("/", "POST"))

    assert (200, None) == (exchange.status, exchange.error)
    assert [1, 2] == await rows()


@pytest.mark.parametrize("scope", SCOPES, ids=str)
async def test_dependency_that_commits_by_hand_at_its_exit(scope, db, drive, rows):
    """G1: the habitual `yield session; await session.commit()` does no harm under us."""
    app = FastAPI()

    async def habitual() -> AsyncIterator[AsyncSession]:
        try:
            yield db.session
            await db.session.commit()
        except Exception:
            await db.session.rollback()
            raise

    @app.post("/{item_id}")
    async def create(
        item_id: int, session: Annotated[AsyncSession, Depends(habitual, **scope)]
    ) -> None:
        session.add(Item(id=item_id))
        if item_id == 2:
            raise HTTPException(400)

    served = added(app, database=db)

    assert 200 == (await drive(served, http_scope("/1", "POST"))).status
    assert 400 == (await drive(served, http_scope("/2", "POST"))).status
    assert [1] == await rows()
