"""A small shop with FastAPI. Run it: uvicorn fastapi_app:app."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_dbscope import Database, DBSessionMiddleware, session_options

# For PostgreSQL: DATABASE_URL=postgresql+asyncpg://user:password@host/name
engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///shop.db"))
db = Database(engine)


class Base(DeclarativeBase):
    """The tables."""


class Order(Base):
    """What somebody wants. An item can be ordered once."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(unique=True)
    is_confirmed: Mapped[bool] = mapped_column(default=False)


class Orders:
    """A service: it asks for the session itself, and never commits."""

    async def place(self, item: str) -> Order:
        """Write an order."""
        order = Order(item=item)
        db.session.add(order)
        await db.session.flush()
        return order

    async def find(self, order_id: int) -> Order | None:
        """Read an order."""
        return await db.session.get(Order, order_id)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make the tables, and close the connections at the end."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
app.add_middleware(DBSessionMiddleware, database=db)

OrdersDep = Annotated[Orders, Depends(Orders)]
SessionDep = Annotated[AsyncSession, Depends(db.get_session)]


@app.exception_handler(IntegrityError)
async def refuse(request: Request, error: IntegrityError) -> JSONResponse:
    """Answer what the database refuses, whether at a flush or at COMMIT."""
    return JSONResponse({"detail": "that is ordered already"}, 409)


@app.post("/orders", status_code=201)
async def place_order(item: str, orders: OrdersDep, background: BackgroundTasks) -> dict[str, int]:
    """Place an order: committed before the 201, confirmed after it."""
    order = await orders.place(item)
    background.add_task(confirm, order)
    return {"id": order.id}


async def confirm(order: Order) -> None:
    """Run after the response, in a transaction of its own."""
    order.is_confirmed = True


@app.post("/orders/preview")
async def preview_order(item: str, orders: OrdersDep) -> dict[str, int]:
    """Say what would happen, and leave nothing."""
    db.set_rollback_only()
    return {"id": (await orders.place(item)).id}


@app.get("/orders/{order_id}")
@session_options(read_only=True)
async def show_order(order_id: int, orders: OrdersDep) -> dict[str, str | bool]:
    """Show an order; the database would refuse a write here."""
    order = await orders.find(order_id)
    if order is None:
        raise HTTPException(404)
    return {"item": order.item, "is_confirmed": order.is_confirmed}


@app.get("/orders")
async def list_orders(session: SessionDep) -> StreamingResponse:
    """Stream all orders; a slow reader holds no connection of the response's."""

    async def lines() -> AsyncIterator[str]:
        for item in await session.scalars(select(Order.item).order_by(Order.id)):
            yield f"{item}\n"

    return StreamingResponse(lines(), media_type="text/plain")
