"""Pytest plugin: engines on a small schema, and what the database saw, as a timeline."""

import contextlib
import functools
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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

MARIADB_DRIVERS = ("asyncmy", "aiomysql", "pymysql")


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


@pytest.fixture(scope="session")
def postgres_schema(postgres_url: str) -> Iterator[sa.Engine]:
    """An engine of its own that looks at the worker's PostgreSQL database; the schema is there."""
    url = sa.make_url(postgres_url).set(drivername="postgresql+psycopg")
    observer = sa.create_engine(url, pool_size=1, isolation_level="AUTOCOMMIT")
    Base.metadata.create_all(observer)
    yield observer
    observer.dispose()


@pytest.fixture
def make_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., AsyncEngine]:
    """Make an engine for a driver; its schema is there, and empty."""

    def make(driver: str, *, file: str = "test.db", **options: Any) -> AsyncEngine:
        if driver == "sqlite":
            return _make_sqlite(tmp_path / file, **options)
        options = {"pool_size": 5, "max_overflow": 5, "pool_timeout": 10, **options}
        if driver in MARIADB_DRIVERS:
            url = request.getfixturevalue("mariadb_schema").url
            return create_async_engine(url.set(drivername=f"mysql+{driver}"), **options)
        url = request.getfixturevalue("postgres_schema").url
        return create_async_engine(url.set(drivername=f"postgresql+{driver}"), **options)

    return make


def _make_sqlite(path: Path, **options: Any) -> AsyncEngine:
    if not path.exists():
        path.write_bytes(_empty_sqlite())
    connect_args = {"timeout": 10, "factory": _SQLite, **options.pop("connect_args", {})}
    return create_async_engine(
        f"sqlite+aiosqlite:///{path}",
        **{"pool_size": 5, "max_overflow": 5, **options},
        connect_args=connect_args,
    )


class _SQLite(sqlite3.Connection):
    """A connection that keeps to foreign keys, and leaves it to the system when it writes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA foreign_keys = ON")
        self.execute("PRAGMA synchronous = OFF")


@functools.cache
def _empty_sqlite() -> bytes:
    """The bytes of a file with the schema, in WAL mode; to copy it costs less than to make it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "empty.db"
        engine = sa.create_engine(f"sqlite:///{path}")
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            Base.metadata.create_all(connection)
            connection.commit()
        engine.dispose()
        return path.read_bytes()


@pytest.fixture(params=DRIVERS)
async def engine(
    request: pytest.FixtureRequest, make_engine: Callable[..., AsyncEngine], timeline: Timeline
) -> AsyncIterator[AsyncEngine]:
    """An engine on an empty schema; another driver by indirect parametrization."""
    engine = make_engine(request.param)
    async with engine.connect():
        pass  # the pool has a connection, as it has in an app that runs
    timeline.watch(engine)
    timeline.clear()
    yield engine
    timeline.clear()
    leaked = engine.pool.checkedout()  # type: ignore[attr-defined]
    if engine.dialect.name != "sqlite":
        tables = Base.metadata.sorted_tables
        async with engine.begin() as connection:
            for table in reversed(tables[:1] if engine.dialect.name == "mysql" else tables):
                await connection.execute(table.delete())
    await engine.dispose()
    assert 0 == leaked, "a connection was not given back"


@pytest.fixture
def db(engine: AsyncEngine) -> Database[Any]:
    """A database over the engine."""
    return Database(engine)


@pytest.fixture
def rows(request: pytest.FixtureRequest, engine: AsyncEngine) -> Callable[[], Awaitable[list[int]]]:
    """What is committed: the ids of the items, by a connection of its own."""
    schemas = {"sqlite": None, "mysql": "mariadb_schema", "postgresql": "postgres_schema"}
    schema = schemas[engine.dialect.name]
    observer = None if schema is None else request.getfixturevalue(schema)

    async def ids() -> list[int]:
        if observer is None:
            with contextlib.closing(sqlite3.connect(str(engine.url.database))) as connection:
                return [each for (each,) in connection.execute("SELECT id FROM item ORDER BY id")]
        with observer.connect() as connection:
            return list(connection.scalars(sa.select(Item.id).order_by(Item.id)))

    return ids
