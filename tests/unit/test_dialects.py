"""The dialect table for databases and drivers that the other tests don't run on."""

from typing import Any

import aiosqlite
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mssql, mysql, oracle, sqlite
from sqlalchemy.engine.default import DefaultDialect

from asgi_dbscope import ConfigurationError, Database, _dialects


def engine_of(dialect: Any) -> sa.Engine:
    """An engine of *dialect* that never connects."""

    def refuse() -> Any:
        raise AssertionError("a connection was asked for")

    return sa.Engine(sa.NullPool(refuse), dialect, sa.make_url("unknown://"))


def test_read_only_is_refused_where_no_database_would_enforce_it():
    """G20: `read_only=True` on a database that we can't make enforce it is an error, no promise."""
    with pytest.raises(ConfigurationError, match="can't be enforced on mssql yet") as caught:
        _dialects.check_shape(engine_of(mssql.dialect()), isolation_level=None, read_only=True)

    assert "database user that may only read" in str(caught.value)


@pytest.mark.parametrize("dialect", [mssql.dialect(), oracle.dialect()])
def test_read_only_is_refused_where_it_is_asked_for(dialect):
    """G20: a block and a scope that no database would hold to it are refused when they are made."""
    db = Database(engine_of(dialect))

    with pytest.raises(ConfigurationError, match="can't be enforced on"):
        db.transactional(read_only=True)
    with pytest.raises(ConfigurationError, match="can't be enforced on"):
        db.session_scope(read_only=True)


@pytest.mark.parametrize("dialect", [mysql.dialect(), sqlite.dialect()])
def test_what_only_postgresql_has_is_refused_when_the_database_is_made(dialect):
    """A label in `pg_stat_activity`, and an answer to a doubt, are refused at once elsewhere."""
    with pytest.raises(ConfigurationError, match="PostgreSQL"):
        Database(engine_of(dialect), label_transactions="application_name")
    with pytest.raises(ConfigurationError, match="PostgreSQL"):
        Database(engine_of(dialect), resolve_in_doubt=True)


def test_unknown_isolation_level_is_told_without_a_connection():
    """G20: A level that the database doesn't have is refused before a connection is taken."""
    with pytest.raises(ConfigurationError, match="'SNAPSHOT' is none of mysql's: SERIALIZABLE"):
        _dialects.check_isolation_level(engine_of(mysql.dialect()), "SNAPSHOT")


@pytest.mark.parametrize("level", ["repeatable_read", "Serializable", "READ COMMITTED"])
def test_isolation_level_is_known_however_it_is_spelled(level):
    """G20: A level is known in each of the spellings that SQLAlchemy takes."""
    _dialects.check_isolation_level(engine_of(mysql.dialect()), level)


def test_isolation_level_is_left_to_a_dialect_that_lists_none():
    """G20: Where a dialect doesn't say which levels it has, its database is the one to refuse."""
    engine = engine_of(DefaultDialect())
    with pytest.raises(NotImplementedError):
        engine.dialect.get_isolation_level_values(None)  # type: ignore[arg-type]

    _dialects.check_isolation_level(engine, "SNAPSHOT")


def test_driver_that_says_nothing_of_transactions_is_in_none():
    """G19: A driver that can't tell is left to SQLAlchemy's own reset."""
    assert not _dialects.is_in_transaction(object())


async def test_closed_connection_is_in_no_transaction():
    """G19: A connection that is closed can't say any more, and is in no transaction."""
    connection = await aiosqlite.connect(":memory:")
    await connection.execute("BEGIN")
    assert _dialects.is_in_transaction(connection)

    await connection.close()

    with pytest.raises(ValueError, match="no active connection"):
        _ = connection.in_transaction
    assert not _dialects.is_in_transaction(connection)


def test_connection_that_is_closed_already_can_not_be_cut():
    """Who cuts a connection from another thread may come too late."""
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.close()

        assert not _dialects.cut(connection)

        connection.invalidate()
    engine.dispose()


def test_two_databases_of_an_engine_note_its_server_once():
    """G15: the second one finds that the engine's connections note their server already."""
    engine = sa.create_engine("postgresql+psycopg://nobody@/nothing")

    assert Database(engine, resolve_in_doubt=True).resolve_in_doubt
    assert Database(engine, name="second", resolve_in_doubt=True).resolve_in_doubt
