"""Pytest plugin: synchronous engines, none of whose connections is left out of the pool."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from asgi_dbscope import Database
from tests.fix_database import Base, Timeline
from tests.sync_apps import Rows, committed

SYNC_DRIVERS = ("sqlite", "psycopg")
"""What a test of a guarantee runs on, unless it says otherwise."""

MakeEngine = Callable[..., sa.Engine]


@pytest.fixture
def make_sync_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeEngine]:
    """Make an engine for a driver, with an empty schema; at the end none of its pool is out."""
    engines: list[sa.Engine] = []

    def make(driver: str, *, file: str = "sync.db", **options: Any) -> sa.Engine:
        options = {"pool_size": 5, "max_overflow": 5, "pool_timeout": 10, **options}
        if driver == "sqlite":
            engine = _make_sqlite(tmp_path / file, **options)
        else:
            url = sa.make_url(request.getfixturevalue("postgres_url"))
            engine = sa.create_engine(url.set(drivername=f"postgresql+{driver}"), **options)
        Base.metadata.create_all(engine)
        engines.append(engine)
        return engine

    yield make
    leaked = [engine.pool.checkedout() for engine in engines]  # type: ignore[attr-defined]
    for engine in engines:
        with engine.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                connection.execute(table.delete())
        engine.dispose()
    assert [0] * len(engines) == leaked, "a connection was not given back"


def _make_sqlite(path: Path, **options: Any) -> sa.Engine:
    engine = sa.create_engine(f"sqlite:///{path}", **{"connect_args": {"timeout": 10}, **options})

    @sa.event.listens_for(engine, "connect")
    def enforce_foreign_keys(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    return engine


@pytest.fixture(params=SYNC_DRIVERS)
def sync_engine(
    request: pytest.FixtureRequest, make_sync_engine: MakeEngine, timeline: Timeline
) -> sa.Engine:
    """A synchronous engine on an empty schema, watched by the timeline."""
    engine = make_sync_engine(request.param)
    for name in ("begin", "commit", "rollback", "savepoint", "checkout", "checkin"):
        sa.event.listen(engine, name, _recorder(timeline, name))
    timeline.clear()
    return engine


def _recorder(timeline: Timeline, name: str) -> Callable[..., None]:
    return lambda *args, **kwargs: timeline.append(name)


@pytest.fixture
def sync_db(sync_engine: sa.Engine) -> Database[Any]:
    """A database over the synchronous engine; a clean-up may take two seconds."""
    return Database(sync_engine, cleanup_timeout=2.0)


@pytest.fixture
def sync_rows(sync_engine: sa.Engine) -> Rows:
    """What is committed: the ids of the items, by a connection of its own."""
    return lambda: committed(sync_engine)
