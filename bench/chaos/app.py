"""The ledger's HTTP side, the same for every contestant."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from bench.chaos import ledger

OUTCOME = "x-outcome"
IN_DOUBT = "in doubt"
"""The header of an answer that doesn't know, and what it says."""

APPLICATION_NAME = "chaos app"
"""What PostgreSQL calls its connections."""

GRACE = 5
"""Seconds that requests under way have after SIGTERM."""

STATE = "/-/state"
"""The path of the page about the process."""

Use = Callable[[AsyncSession], AbstractAsyncContextManager[AsyncSession]]


@asynccontextmanager
async def the_same(session: AsyncSession) -> AsyncIterator[AsyncSession]:
    """The request's own session."""
    yield session


def disposing(engine: AsyncEngine) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """A lifespan that ends with the engine's connections."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.dispose()

    return lifespan


@dataclass
class Contestant:
    """An app, and how its code gets a session.

    Attributes:
        app: What is served, with its middleware.

        engine: What its sessions use.

        get_session: The dependency of an endpoint.

        in_body: What a streaming body uses, given the endpoint's session.

        in_background: What work after the response uses, given the endpoint's session.
    """

    app: FastAPI
    engine: AsyncEngine | Engine
    get_session: Callable[..., Any]
    in_body: Use = the_same
    in_background: Use = the_same


class Order(BaseModel):
    """What a client asks for.

    Attributes:
        id: The request's.

        pause: Seconds between the two balances' changes, while the first is locked.

        then: What happens after the writes.

        is_serializable: Whether the transaction is.

        has_receipt: Whether a receipt is written after the response.
    """

    id: int
    sender: int
    recipient: int
    pause: float = 0.0
    then: Literal["answer", "refuse", "fail", "swallow", "wait", "time out"] = "answer"
    is_serializable: bool = False
    has_receipt: bool = False


def add_endpoints(contestant: Contestant) -> None:
    """Add what every contestant's app has."""
    add_transfers(contestant)
    add_statements(contestant)


def add_transfers(contestant: Contestant) -> None:
    """Add what moves money."""
    session_type = Annotated[AsyncSession, Depends(contestant.get_session)]

    async def write_receipt(session: AsyncSession, transfer: int) -> None:
        async with contestant.in_background(session) as own:
            own.add(ledger.Receipt(transfer_id=transfer))
            await own.flush()

    async def transfer(order: Order, session: session_type, tasks: BackgroundTasks) -> Any:
        if order.is_serializable:
            await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        await move(order, session)
        if order.has_receipt:
            tasks.add_task(write_receipt, session, order.id)
        await finish(order, session)
        return {"transfer": order.id}

    # The request's id is in the path for the sake of the log.
    contestant.app.post("/transfers/{number}", status_code=201)(transfer)

    @contestant.app.get("/balance")
    async def balance(session: session_type) -> int:
        return int(await session.scalar(ledger.SUM) or 0)


async def move(order: Order, session: AsyncSession) -> None:
    """A transfer's writes."""
    await session.execute(ledger.TAKE, {"amount": 1, "id": order.sender})
    if order.pause:
        await asyncio.sleep(order.pause)
    await session.execute(ledger.TAKE, {"amount": -1, "id": order.recipient})
    session.add(ledger.Transfer(id=order.id))
    await session.flush()
    session.add_all(ledger.entries(order.id, order.sender, order.recipient))
    await session.flush()


async def finish(order: Order, session: AsyncSession) -> None:
    """What happens after a transfer's writes."""
    refuse_or_fail(order)
    match order.then:
        case "swallow":
            with suppress(IntegrityError):  # it is there already: fine, or so this app believes
                await session.execute(ledger.LABEL_AGAIN)
        case "wait":
            await session.execute(ledger.SLEEP)
        case "time out":
            try:
                async with asyncio.timeout(0.02):
                    await session.execute(ledger.SLEEP)
            except TimeoutError:
                raise HTTPException(504, "too slow") from None


def refuse_or_fail(order: Order) -> None:
    """The endings that touch no database."""
    if order.then == "refuse":
        raise HTTPException(409, "not enough money")
    if order.then == "fail":
        raise RuntimeError("a bug")


def add_statements(contestant: Contestant) -> None:
    """Add what streams."""
    session_type = Annotated[AsyncSession, Depends(contestant.get_session)]

    async def print_pages(session: AsyncSession, order: int, pages: int) -> AsyncIterator[bytes]:
        async with contestant.in_body(session) as own:
            for number in range(pages):
                own.add(ledger.Page(transfer_id=order))
                await own.flush()
                yield f"page {number}\n".encode().ljust(4096)
                await asyncio.sleep(0.005)

    @contestant.app.post("/statements/{number}")
    async def statement(order: Order, session: session_type, pages: int) -> StreamingResponse:
        await move(order, session)
        return StreamingResponse(print_pages(session, order.id, pages))
