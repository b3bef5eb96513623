"""What an engine for reads is made with, and which databases can have one."""

import re
from typing import Any, cast

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import oracle
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    read_only_options,
    session_options,
)
from asgi_dbscope._dialects import is_held_read_only
from asgi_dbscope._options import ScopeOptions

ASYNCPG = "postgresql+asyncpg://me:s3cret@replica/shop"
PSYCOPG = "postgresql+psycopg://me:s3cret@replica/shop"
HELD = "-c default_transaction_read_only=on"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """An app that nobody calls."""


def test_asyncpg_tells_the_server_at_the_start():
    """The setting is sent with asyncpg's others, and what else the engine is told stays."""
    options = read_only_options(
        ASYNCPG, pool_size=3, connect_args={"timeout": 5, "server_settings": {"jit": "off"}}
    )

    settings = {"jit": "off", "default_transaction_read_only": "on"}
    assert {
        "pool_size": 3,
        "isolation_level": "AUTOCOMMIT",
        "connect_args": {"timeout": 5, "server_settings": settings},
    } == options


def test_isolation_level_of_the_engine_is_not_to_be_chosen():
    """Reads are in AUTOCOMMIT; another level is for the request that needs it."""
    with pytest.raises(ConfigurationError, match=r"session_options\(isolation_level=\.\.\.\)"):
        read_only_options(ASYNCPG, isolation_level="SERIALIZABLE")


@pytest.mark.parametrize(
    ("url", "connect_args", "expected"),
    [
        (PSYCOPG, None, HELD),
        (PSYCOPG.replace("psycopg", "psycopg_async"), {}, HELD),
        (PSYCOPG, {"options": "-c jit=off"}, f"-c jit=off {HELD}"),
        (f"{PSYCOPG}?options=-c%20jit%3Doff", None, f"-c jit=off {HELD}"),
    ],
)
def test_psycopg_tells_the_server_at_the_start(url, connect_args, expected):
    """The setting is added to libpq's options, wherever others stand."""
    options = read_only_options(sa.make_url(url), connect_args=connect_args)

    assert {"isolation_level": "AUTOCOMMIT", "connect_args": {"options": expected}} == options


@pytest.mark.parametrize(
    ("source", "reads", "reason"),
    [
        ("sqlite+aiosqlite://", "sqlite+aiosqlite://", "reads is for PostgreSQL.* only be slower"),
        ("sqlite+aiosqlite://", ASYNCPG, "reads is for PostgreSQL.*sqlite\\+aiosqlite"),
        ("mysql+asyncmy://me@here/shop", ASYNCPG, "reads is for PostgreSQL.*mysql\\+asyncmy"),
        (ASYNCPG, "mysql+asyncmy://me@here/shop", "reads is for PostgreSQL.*mysql\\+asyncmy"),
        (ASYNCPG, sa.create_engine(PSYCOPG), "must be an asynchronous engine"),
        (sa.create_engine(PSYCOPG), create_async_engine(ASYNCPG), "must be a synchronous engine"),
        (ASYNCPG, 5, "must be an AsyncEngine or an Engine, or a URL; got 5"),
    ],
)
def test_what_cannot_have_reads_is_refused(source, reads, reason):
    """Databases and engines that don't go together are refused where they are named."""
    with pytest.raises(ConfigurationError, match=reason) as caught:
        Database(source, reads=reads)

    assert "s3cret" not in str(caught.value)


def test_engine_of_the_database_is_refused():
    """The database's own connections can't be read-only."""
    engine = create_async_engine(ASYNCPG)
    with pytest.raises(ConfigurationError, match=r"\*\*read_only_options\(url\)"):
        Database(engine, reads=engine)


@pytest.mark.parametrize("bound", [{}, {"binds": {object: None}}])
def test_factory_has_to_have_one_engine(bound):
    """Reads stand beside one engine: a factory without one, or with binds, is refused."""
    if bound:
        bound["bind"] = create_async_engine(ASYNCPG)
    with pytest.raises(ConfigurationError, match="bound to one engine"):
        Database(async_sessionmaker(**bound), reads=ASYNCPG)


@pytest.mark.parametrize("pooler", [None, "pgbouncer"])
async def test_url_makes_an_engine_for_reads(pooler):
    """A URL gives an engine of its own; behind a pooler, one with the pooler's options."""
    database = Database(ASYNCPG, reads=ASYNCPG, pooler=pooler)

    assert isinstance(database.owned_reads, AsyncEngine)
    assert database.owned_reads is not database.owned_engine
    assert sa.make_url(ASYNCPG) == database.owned_reads.url
    await database.dispose()


async def test_engine_hears_what_the_databases_own_does():
    """Labels in comments and the server's identity are for the second engine, too."""
    for _ in range(2):
        reads = create_async_engine(ASYNCPG, **read_only_options(ASYNCPG))
        for _ in range(2):
            Database(ASYNCPG, reads=reads, label_transactions="comment", resolve_in_doubt=True)

        assert 1 == len(reads.sync_engine.dispatch.before_cursor_execute)
        assert 1 == len(reads.sync_engine.pool.dispatch.checkin)


def test_autocommit_of_reads_is_not_asked_for_by_the_mode():
    """`mode="autocommit"` with `read_only` stays refused, and reads change nothing without it."""
    with pytest.raises(ConfigurationError, match="no transaction that read_only"):
        session_options(mode="autocommit", read_only=True)

    assert not ScopeOptions(has_reads=True).uses_reads
    assert not ScopeOptions(read_only=True).uses_reads
    assert ScopeOptions(has_reads=True, read_only=True).reads_at_once


def test_connection_that_says_nothing_is_not_held():
    """A connection that is closed, broken or too old to tell counts as one that may write."""
    assert not is_held_read_only(object())


@pytest.mark.parametrize("methods", ["GET", ["get"], [5], [], ("GET", "")])
def test_methods_are_a_list_in_capitals(methods):
    """A string, or a method that no request would have, is refused when the app is built."""
    with pytest.raises(ConfigurationError, match=re.escape(f"got {methods!r}")):
        DBSessionMiddleware(
            app, database=Database("sqlite+aiosqlite://"), read_only_methods=methods
        )


def test_methods_need_a_database_that_can_be_read_only():
    """Where the database can't refuse writes, no method makes a request read-only."""
    database = Database(
        sa.Engine(sa.NullPool(cast("Any", object)), oracle.dialect(), sa.make_url("oracle://"))
    )
    with pytest.raises(ConfigurationError, match="can't be enforced on oracle"):
        DBSessionMiddleware(app, database=database, read_only_methods=["GET"])
