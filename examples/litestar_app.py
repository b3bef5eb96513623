"""A small shop with Litestar. Run it: uvicorn litestar_app:app."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from litestar import Litestar, Request, get, post
from litestar.exceptions import NotFoundException
from litestar.middleware import DefineMiddleware
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_dbscope import DBSessionMiddleware, current_session

# For PostgreSQL: DATABASE_URL=postgresql+asyncpg://user:password@host/name
engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///shop.db"))


class Base(DeclarativeBase):
    """The tables."""


class Order(Base):
    """What somebody wants."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


async def place(item: str) -> Order:
    """Write an order; like all code below the endpoints it just asks for the session."""
    order = Order(item=item)
    current_session().add(order)
    await current_session().flush()
    return order


@post("/orders")
async def place_order(request: Request) -> dict[str, int]:
    """Place an order: committed before the 201 goes out."""
    order = await place(request.query_params["item"])
    return {"id": order.id}


@post("/orders/none-left")
async def place_and_refuse(request: Request) -> None:
    """Raise after the order was written: it is rolled back."""
    await place(request.query_params["item"])
    raise NotFoundException("none left")


@get("/orders/{order_id:int}")
async def show_order(request: Request) -> dict[str, str]:
    """Show an order."""
    order = await current_session().get(Order, request.path_params["order_id"])
    if order is None:
        raise NotFoundException
    return {"item": order.item}


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncIterator[None]:
    """Make the tables, and close the connections at the end."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


app = Litestar(
    [place_order, place_and_refuse, show_order],
    lifespan=[lifespan],
    middleware=[DefineMiddleware(DBSessionMiddleware, engine=engine)],
)
