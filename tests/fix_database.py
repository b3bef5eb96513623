"""Pytest plugin: engines on a small schema, and what the database saw, as a timeline."""

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_dbscope import Database

DRIVERS = ("sqlite", "asyncpg")
"""What a test of a guarantee runs on, unless it says otherwise."""

POSTGRES_DRIVERS = ("asyncpg", "psycopg")


class Base(DeclarativeBase):
    """The schema of the tests."""


class Item(Base):
    """A row to write."""

    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    note: Mapped[str | None]


class Child(Base):
    """A row whose parent is asked for only at COMMIT: without one, only COMMIT fails."""

    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    item_id: Mapped[int] = mapped_column(
        sa.ForeignKey("item.id", deferrable=True, initially="DEFERRED")
    )


class Timeline(list[str]):
    """What happened, in order: the database's events, and the app's messages by `fix_asgi`."""

    def watch(self, engine: AsyncEngine) -> None:
        """Record the events of *engine*."""
        sync = engine.sync_engine

        def recorder(name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: self.append(name)

        for name in ("begin", "commit", "rollback", "savepoint", "rollback_savepoint"):
            sa.event.listen(sync, name, recorder(name))
        for name in ("checkout", "checkin"):
            sa.event.listen(sync, name, recorder(name))


@pytest.fixture
def timeline() -> Timeline:
    """An empty timeline."""
    return Timeline()


@pytest.fixture
def make_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., AsyncEngine]:
    """Make an engine for a driver; its schema is there, and empty."""

    def make(driver: str, **options: Any) -> AsyncEngine:
        if driver == "sqlite":
            return _make_sqlite(tmp_path / "test.db", **options)
        url = sa.make_url(request.getfixturevalue("postgres_url"))
        return create_async_engine(
            url.set(drivername=f"postgresql+{driver}"),
            **{"pool_size": 5, "max_overflow": 5, "pool_timeout": 10, **options},
        )

    return make


def _make_sqlite(path: Path, **options: Any) -> AsyncEngine:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}",
        **{"pool_size": 5, "max_overflow": 5, "connect_args": {"timeout": 10}, **options},
    )

    @sa.event.listens_for(engine.sync_engine, "connect")
    def enforce_foreign_keys(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    return engine


@pytest.fixture(params=DRIVERS)
async def engine(
    request: pytest.FixtureRequest, make_engine: Callable[..., AsyncEngine], timeline: Timeline
) -> AsyncIterator[AsyncEngine]:
    """An engine on an empty schema; another driver by indirect parametrization."""
    engine = make_engine(request.param)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    timeline.watch(engine)
    timeline.clear()
    yield engine
    timeline.clear()
    leaked = engine.pool.checkedout()  # type: ignore[attr-defined]
    async with engine.begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            await connection.execute(table.delete())
    await engine.dispose()
    assert 0 == leaked, "a connection was not given back"


@pytest.fixture
def db(engine: AsyncEngine) -> Database[Any]:
    """A database over the engine; a clean-up may take two seconds."""
    return Database(engine, cleanup_timeout=2.0)


@pytest.fixture
def rows(engine: AsyncEngine) -> Callable[[], Awaitable[list[int]]]:
    """What is committed: the ids of the items, by a connection of its own."""

    async def ids() -> list[int]:
        other = create_async_engine(engine.url, poolclass=sa.NullPool)
        async with other.connect() as connection:
            found = await connection.scalars(sa.select(Item.id).order_by(Item.id))
            return list(found)

    return ids
