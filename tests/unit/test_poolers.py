"""What an engine behind a pooler is told, and what it can't be told."""

import re

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import ConfigurationError, Database, pgbouncer_options

ASYNCPG = "postgresql+asyncpg://me:s3cret@pooler:6432/shop"
PSYCOPG = "postgresql+psycopg://me:s3cret@pooler:6432/shop"


def test_what_else_the_engine_is_told_stays():
    """The options that somebody gives are handed back, with the driver's beside them."""
    options = pgbouncer_options(
        sa.make_url(ASYNCPG), pool_size=3, connect_args={"timeout": 5, "statement_cache_size": 0}
    )
    connect_args = options.pop("connect_args")

    assert {"pool_size": 3} == options
    assert "" == connect_args.pop("prepared_statement_name_func")()
    assert {
        "timeout": 5,
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
    } == connect_args


@pytest.mark.parametrize("url", [PSYCOPG, PSYCOPG.replace("psycopg", "psycopg_async")])
def test_psycopg_prepares_nothing(url):
    """The driver psycopg is told never to prepare, by either of its names."""
    assert {"connect_args": {"prepare_threshold": None}} == pgbouncer_options(url)


@pytest.mark.parametrize(
    ("url", "connect_args", "name"),
    [
        (ASYNCPG, {"statement_cache_size": 100}, "statement_cache_size"),
        (ASYNCPG, {"prepared_statement_name_func": str}, "prepared_statement_name_func"),
        (f"{ASYNCPG}?prepared_statement_cache_size=9", None, "prepared_statement_cache_size"),
        (PSYCOPG, {"prepare_threshold": 5}, "prepare_threshold"),
    ],
)
def test_prepared_statements_are_refused(url, connect_args, name):
    """What would keep prepared statements is refused by its name, when the engine is built."""
    with pytest.raises(ConfigurationError, match=f"^{name} can't be chosen") as caught:
        pgbouncer_options(url, connect_args=connect_args)

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "connect_args", "name"),
    [
        (ASYNCPG, {"server_settings": {"search_path": "shop"}}, "server_settings"),
        (PSYCOPG, {"options": "-c statement_timeout=5000"}, "options"),
        (f"{PSYCOPG}?options=-c%20search_path%3Dshop", None, "options"),
    ],
)
def test_settings_of_the_session_are_refused(url, connect_args, name):
    """A setting that the pooler would refuse, or lose, is refused by its name."""
    with pytest.raises(ConfigurationError, match=f"^{name} can't be used") as caught:
        pgbouncer_options(url, connect_args=connect_args)

    assert "s3cret" not in str(caught.value)


def test_settings_that_the_pooler_takes_along_are_allowed():
    """The name of the app and the time zone are PgBouncer's to keep."""
    settings = {"application_name": "shop", "TimeZone": "UTC"}
    options = pgbouncer_options(ASYNCPG, connect_args={"server_settings": settings})

    assert settings == options["connect_args"]["server_settings"]


def test_what_the_url_says_already_is_no_conflict():
    """A URL may say itself that nothing is to be kept."""
    options = pgbouncer_options(f"{ASYNCPG}?prepared_statement_cache_size=0")

    assert 0 == options["connect_args"]["prepared_statement_cache_size"]


@pytest.mark.parametrize("drivername", ["sqlite+aiosqlite", "mysql+asyncmy", "postgresql"])
def test_other_drivers_are_refused(drivername):
    """A driver that it knows nothing of is refused, and named."""
    with pytest.raises(ConfigurationError, match=f"says {re.escape(drivername)}\\.$") as caught:
        pgbouncer_options(sa.make_url(ASYNCPG).set(drivername=drivername))

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", [ASYNCPG, PSYCOPG])
async def test_database_makes_its_engine_for_a_pooler(url):
    """`Database(url, pooler="pgbouncer")` makes its engine with the same options."""
    database = Database(url, pooler="pgbouncer")

    assert database.owned_engine is not None
    assert sa.make_url(url) == database.owned_engine.url
    await database.dispose()


async def test_engine_that_is_made_already_is_refused():
    """`pooler=` can't change an engine, and says how to make one."""
    engine = create_async_engine(ASYNCPG)
    with pytest.raises(ConfigurationError, match=r"\*\*pgbouncer_options\(url\)"):
        Database(engine, pooler="pgbouncer")


def test_unknown_pooler_is_refused():
    """Only poolers that it knows can be named."""
    with pytest.raises(ConfigurationError, match="pooler must be one of 'pgbouncer'"):
        Database(ASYNCPG, pooler="pgpool")  # type: ignore[call-overload]
