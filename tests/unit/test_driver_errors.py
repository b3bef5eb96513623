"""Errors of databases and drivers, and what they say of the transaction."""

import sqlite3
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mssql, mysql

from asgi_dbscope import _driver_errors


def connection_of(dialect: Any) -> Any:
    """What the table asks of a connection to a database that isn't there."""
    engine = SimpleNamespace(dialect=dialect, get_execution_options=dict)
    return SimpleNamespace(dialect=dialect, engine=engine, get_execution_options=dict)


def test_error_aborts_no_transaction_on_a_database_that_goes_on():
    """G21: where only the failed statement is rolled back, the rest may still be committed."""
    error = sqlite3.IntegrityError("duplicate")

    assert not _driver_errors.may_abort(connection_of(mysql.dialect()), error)
    assert not _driver_errors.may_abort(connection_of(mssql.dialect()), error)


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
    assert is_unanswered is _driver_errors.is_unanswered(context)
