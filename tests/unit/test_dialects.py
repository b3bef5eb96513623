"""The dialect table for databases and drivers that the other tests don't run on."""

import sqlite3
from types import SimpleNamespace
from typing import Any

import aiosqlite
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mssql, mysql, oracle, sqlite
from sqlalchemy.engine.default import DefaultDialect

from asgi_dbscope import ConfigurationError, Database, _dialects


def connection_of(dialect: Any) -> Any:
    """What the table asks of a connection to a database that isn't there."""
    engine = SimpleNamespace(dialect=dialect, get_execution_options=dict)
    return SimpleNamespace(dialect=dialect, engine=engine, get_execution_options=dict)


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


def test_error_aborts_no_transaction_on_a_database_that_goes_on():
    """G21: where only the failed statement is rolled back, the rest may still be committed."""
    error = sqlite3.IntegrityError("duplicate")

    assert not _dialects.may_abort(connection_of(mysql.dialect()), error)
    assert not _dialects.may_abort(connection_of(mssql.dialect()), error)


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


def told(dialect: str, error: BaseException, **more: Any) -> Any:
    """What SQLAlchemy tells of an error that COMMIT met with; its drivers' errors are sqlite3's."""
    known = {"statement": None, "is_disconnect": False, **more}
    return SimpleNamespace(
        original_exception=error,
        dialect=SimpleNamespace(name=dialect, loaded_dbapi=sqlite3),
        **known,
    )


def sent(severity: str | None, sqlstate: str | None, cls: type[Exception] = sqlite3.Error) -> Any:
    """An error with what a PostgreSQL server has said in it."""
    error: Any = cls("told")
    error.sqlstate = sqlstate
    error.diag = SimpleNamespace(severity_nonlocalized=severity, severity="FEHLER")
    return error


def sent_to_psycopg2(severity: str, pgcode: str) -> Any:
    """The same as psycopg2 tells it."""
    error = sent(severity, None)
    error.pgcode = pgcode
    return error


def adapted(error: Exception) -> Exception:
    """The same as a cause, as SQLAlchemy's dialect for asyncpg has it."""
    outer = sqlite3.Error("adapted")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("context", "is_unanswered"),
    [
        # The server's own word, however the driver passes it on.
        (told("postgresql", sent("ERROR", "23503")), False),
        (told("postgresql", adapted(sent("ERROR", "40001"))), False),
        (told("postgresql", sent("ERROR", "40P01"), is_disconnect=True), False),
        # Its last word, or one that says that it doesn't know.
        (told("postgresql", sent("FATAL", "57P01")), True),
        (told("postgresql", sent("PANIC", "XX000")), True),
        (told("postgresql", sent("ERROR", "08006")), True),
        (told("postgresql", sent("ERROR", "57P02")), True),
        (told("cockroachdb", sent("ERROR", "40003")), True),
        (told("cockroachdb", sent_to_psycopg2("ERROR", "40003")), True),
        # The driver's.
        (told("postgresql", sqlite3.OperationalError("server closed the connection")), True),
        (told("postgresql", sqlite3.InterfaceError("another operation is in progress")), False),
        (told("postgresql", sqlite3.InterfaceError("is closed"), is_disconnect=True), True),
        (told("mysql", sqlite3.OperationalError(1213, "deadlock")), False),
        (told("mysql", sqlite3.OperationalError(2013, "lost connection")), True),
        (told("mariadb", sqlite3.OperationalError(1927, "connection was killed")), True),
        (told("mariadb", sqlite3.OperationalError()), False),
        (told("sqlite", sqlite3.OperationalError("database is locked")), False),
        (told("mssql", sqlite3.OperationalError("gone"), is_disconnect=True), True),
        # Neither's.
        (told("postgresql", TimeoutError()), True),
        (told("mysql", ConnectionResetError()), True),
        (told("postgresql", sa.exc.InvalidRequestError("nothing was sent")), False),
        (told("postgresql", KeyboardInterrupt(), is_disconnect=True), True),
        # A statement's, in a listener to the COMMIT.
        (told("postgresql", TimeoutError(), statement="SELECT 1"), False),
    ],
)
def test_only_the_databases_own_word_is_an_answer(context, is_unanswered):
    """G15: what says nothing of the transaction leaves its COMMIT without an answer."""
    assert is_unanswered is _dialects.is_unanswered(context)


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
