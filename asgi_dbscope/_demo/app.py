"""The ledger's HTTP side: the same endpoints twice, and only the way to a session differs."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from asgi_dbscope import Database, DBSessionMiddleware
from asgi_dbscope._demo import ledger


def make_app(sessions: async_sessionmaker[AsyncSession]) -> FastAPI:
    """The app with asgi_dbscope."""
    db = Database(sessions)

    async def discard(session: AsyncSession) -> None:  # noqa: ARG001 - the other app needs it
        db.set_rollback_only()

    app = FastAPI(title="A ledger, with asgi_dbscope")
    app.add_middleware(DBSessionMiddleware, database=db)
    add_endpoints(app, db.get_session, discard)
    return app


def make_yield_app(sessions: async_sessionmaker[AsyncSession]) -> FastAPI:
    """The app as it is mostly written: a dependency that yields, then commits."""

    async def get_session() -> AsyncIterator[AsyncSession]:
        async with sessions() as session:
            try:
                yield session
                await session.commit()
            except Exception:
                await session.rollback()
                raise

    async def discard(session: AsyncSession) -> None:
        await session.rollback()

    app = FastAPI(title="A ledger, with a yield dependency")
    add_endpoints(app, get_session, discard)
    return app


def add_endpoints(
    app: FastAPI,
    get_session: Callable[..., Any],
    discard: Callable[[AsyncSession], Awaitable[None]],
) -> None:
    """Add what both apps have."""
    add_transfers(app, get_session, discard)
    add_reading(app, get_session)


def add_transfers(
    app: FastAPI,
    get_session: Callable[..., Any],
    discard: Callable[[AsyncSession], Awaitable[None]],
) -> None:
    """Add what writes."""

    @app.exception_handler(IntegrityError)
    async def refuse(request: Request, error: IntegrityError) -> JSONResponse:  # noqa: ARG001 - FastAPI's
        return JSONResponse({"detail": "no such account"}, 409)

    @app.post("/transfers", status_code=201)
    async def transfer(
        order: ledger.Order,
        tasks: BackgroundTasks,
        session: Annotated[AsyncSession, Depends(get_session)],
    ) -> Any:
        try:
            transfer = await ledger.book(session, order)
        except ledger.OverdrawnError:
            raise HTTPException(409, "not enough money") from None
        if order.via == "bank":
            try:
                await ledger.tell_bank()
            except ConnectionError:
                return JSONResponse({"detail": "the bank is down"}, 502)
        if order.receipt is not None:
            tasks.add_task(ledger.write_receipt, session, transfer.id, order.receipt)
        return {"transfer": transfer.id}

    @app.post("/transfers/preview")
    async def preview(
        order: ledger.Order, session: Annotated[AsyncSession, Depends(get_session)]
    ) -> dict[str, int]:
        await ledger.book(session, order)
        balances = await ledger.balances(session)
        await discard(session)
        return balances


def add_reading(app: FastAPI, get_session: Callable[..., Any]) -> None:
    """Add what is read."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "up"}

    @app.get("/accounts")
    async def accounts(session: Annotated[AsyncSession, Depends(get_session)]) -> dict[str, int]:
        return await ledger.balances(session)

    @app.get("/statement")
    async def statement(
        session: Annotated[AsyncSession, Depends(get_session)],
        reader: str = "alice",
        currency: str = "EUR",
        pages: int = 3,
    ) -> StreamingResponse:
        await ledger.balances(session)
        return StreamingResponse(ledger.print_statement(session, reader, currency, pages))

    @app.get("/archive")
    async def archive(
        session: Annotated[AsyncSession, Depends(get_session)], pages: int = 256
    ) -> StreamingResponse:
        await ledger.balances(session)
        return StreamingResponse(ledger.print_archive(pages))
