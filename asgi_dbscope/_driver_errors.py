"""What an error of a database, or of its driver, says of the transaction."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.exc import SQLAlchemyError

from asgi_dbscope._dialects import MYSQL, POSTGRESQL, is_autocommit, is_in_transaction

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext

SQLITE_ROLLED_BACK = frozenset(
    {
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        # ON CONFLICT ROLLBACK, RAISE(ROLLBACK, ...)
        sqlite3.SQLITE_CONSTRAINT,
    }
)
"""Errors after which SQLite may have rolled back by itself (sqlite.org/lang_transaction.html)."""

INNODB_ROLLED_BACK = frozenset({1020, 1206, 1213})
"""Errors at which InnoDB has rolled back the whole transaction; the next statement begins another.

ER_CHECKREAD (a changed record, under ``innodb_snapshot_isolation``), ER_LOCK_TABLE_FULL and
ER_LOCK_DEADLOCK.
"""

LOCK_WAIT_TIMEOUT = 1205
"""InnoDB rolls back the statement; the whole transaction with ``innodb_rollback_on_timeout``."""

CONFLICTS = frozenset({"40001", "40P01"})
"""The SQLSTATEs of a serialization failure and of a deadlock."""

MYSQL_CONFLICTS = frozenset({1020, LOCK_WAIT_TIMEOUT, 1213})
"""ER_CHECKREAD, a lock that did not come in time, ER_LOCK_DEADLOCK."""

MYSQL_DRIVERS = frozenset({"MySQLdb", "aiomysql", "asyncmy", "pymysql"})
"""Packages whose errors have MySQL's error code as their first argument."""

UNCERTAIN = ("08", "57P", "40003")
"""SQLSTATEs, by their beginnings, that say nothing of the transaction.

The connection failed (08), the server was shutting down (57P01 and its like), or says itself that
it doesn't know (40003, CockroachDB).
"""

MYSQL_UNCERTAIN = frozenset({1053, 1152, 1158, 1159, 1160, 1161, 1184, 1927, 3169})
"""MariaDB's and MySQL's errors for a connection that was killed or broke, as the server sees it."""

MYSQL_CLIENT = range(2000, 3000)
"""Errors that their client library makes by itself."""


def is_statement_timeout(error: BaseException) -> bool:
    """Whether *error* is the server's answer to :func:`limit_transaction`."""
    original = getattr(error, "orig", None)
    if getattr(original, "sqlstate", None) == "57014":  # query_canceled
        return True
    return mysql_error(original) == 1969  # noqa: PLR2004 - ER_STATEMENT_TIMEOUT


def is_write_refused(error: BaseException) -> bool:
    """Whether PostgreSQL refused a write because of a read-only transaction."""
    return _sqlstate(getattr(error, "orig", None) or error) == "25006"


def find_conflict(error: BaseException, also: tuple[type[Exception], ...] = ()) -> str | None:
    """The code of the conflict with another transaction that *error* stands for, if it does.

    Looks through SQLAlchemy's wrapper, the causes of errors, and groups of them. An error that was
    raised while a conflict was merely being handled (its ``__context__``) doesn't count: whoever
    handles a conflict may well have healed it.

    Args:
        error: What was raised.

        also: Classes that mean a conflict, too.
    """
    to_see: list[BaseException | None] = [error]
    seen: set[int] = set()
    while to_see:
        each = to_see.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, also):
            return type(each).__name__
        code = _conflict_code(each) or getattr(each, _LOST_COMMIT, None)
        if code is not None:
            return code
        to_see += [each.__cause__, getattr(each, "orig", None)]
        if isinstance(each, BaseExceptionGroup):
            to_see += cast("BaseExceptionGroup[BaseException]", each).exceptions
    return None


_LOST_COMMIT = "asgi_dbscope_lost_commit"


def mark_lost_commit(error: BaseException) -> None:
    """Of the COMMIT that *error* ended nothing was kept, so it may be done again."""
    setattr(error, _LOST_COMMIT, "COMMIT got lost")


def _conflict_code(error: BaseException) -> str | None:
    """The code by which the driver's own *error* tells of a conflict."""
    sqlstate = _sqlstate(error)
    if sqlstate in CONFLICTS:
        return sqlstate
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0)
        return str(error.sqlite_errorname) if code & 0xFF == sqlite3.SQLITE_BUSY else None
    if type(error).__module__.partition(".")[0] in MYSQL_DRIVERS:
        number = mysql_error(error)
        return str(number) if number in MYSQL_CONFLICTS else None
    return None


def may_abort(connection: Connection, error: BaseException) -> bool:
    """Whether the database may have aborted the transaction at *error*, without asking it."""
    dialect = connection.dialect.name
    if is_autocommit(connection):
        return False
    if dialect in POSTGRESQL:
        return True
    if dialect == "sqlite":
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code of an extended one
        return code in SQLITE_ROLLED_BACK and not is_in_transaction(
            connection.connection.dbapi_connection
        )
    if dialect in MYSQL:
        number = mysql_error(error)
        return number == LOCK_WAIT_TIMEOUT or number in INNODB_ROLLED_BACK
    return False


def is_sure(error: BaseException | None) -> bool:
    """Whether no later error can tell more than *error* of what became of the transaction."""
    return error is not None and mysql_error(error) != LOCK_WAIT_TIMEOUT


def can_ask(connection: Connection) -> bool:
    """Whether :func:`is_aborted` learns something from the database without a suspicion."""
    return connection.dialect.name in POSTGRESQL and not is_autocommit(connection)


def is_aborted(connection: Connection, error: BaseException | None) -> bool:
    """Ask the database whether the transaction that :func:`may_abort` suspects is aborted."""
    if connection.dialect.name in POSTGRESQL:
        connection.exec_driver_sql("SELECT 1")  # refused in an aborted transaction (25P02)
        return False
    if connection.dialect.name in MYSQL and mysql_error(error) == LOCK_WAIT_TIMEOUT:
        asked = connection.exec_driver_sql("SELECT @@innodb_rollback_on_timeout")
        return bool(asked.scalar())
    return True


def outlives_cancellation(connection: Connection, error: BaseException) -> bool:
    """Whether the connection is still good after a query on it was cancelled.

    aiosqlite's thread finishes the query, and the ROLLBACK queues behind it. Were the connection
    thrown away instead, inside the task that is being cancelled, a second cancellation would leave
    a task of SQLAlchemy's waiting for ever, and the file would stay locked until the garbage
    collector finds the query's cursor (in the traceback of its cancellation).
    """
    return connection.dialect.driver == "aiosqlite" and not isinstance(error, Exception)


def is_unanswered(context: ExceptionContext) -> bool:
    """Whether the error of a COMMIT leaves open what became of it.

    It does unless the database itself said that COMMIT failed, or nothing was sent. A driver's
    timeout, an operating system's error, a server that is shutting down: none of them is an answer.
    """
    error = context.original_exception
    if context.statement is not None or not isinstance(error, Exception):
        return context.is_disconnect  # of a listener to the COMMIT; or a cancellation
    dbapi: Any = context.dialect.loaded_dbapi
    if not isinstance(error, dbapi.Error):
        return not isinstance(error, SQLAlchemyError)
    if context.dialect.name in POSTGRESQL:
        if _is_refusal(error):
            return False
        # Made by the driver itself: these say that it was used wrongly, and so sent nothing.
        is_misuse = isinstance(error, (dbapi.InterfaceError, dbapi.ProgrammingError))
        return context.is_disconnect or not is_misuse
    return context.is_disconnect or (context.dialect.name in MYSQL and _is_mysql_uncertain(error))


def _is_mysql_uncertain(error: BaseException) -> bool:
    number = mysql_error(error)
    return number is not None and (number in MYSQL_UNCERTAIN or number in MYSQL_CLIENT)


def _is_refusal(error: BaseException) -> bool:
    """Whether a PostgreSQL server said of a statement that it failed, and went on living.

    FATAL and PANIC end the session, and may come after the COMMIT was done: between that and its
    answer a server can be told to shut down.
    """
    for each in (error, error.__cause__):  # SQLAlchemy's adaption of asyncpg's
        diagnosis = getattr(each, "diag", each)
        severity = getattr(diagnosis, "severity_nonlocalized", None) or getattr(
            diagnosis, "severity_en", None
        )
        severity = severity or getattr(diagnosis, "severity", None)
        if severity is not None:
            return severity == "ERROR" and not _sqlstate(each).startswith(UNCERTAIN)
    return False


def mysql_error(error: BaseException | None) -> int | None:
    """The number of an error of MariaDB or MySQL, as their drivers tell it."""
    number = error.args[0] if error is not None and error.args else None
    return number if isinstance(number, int) else None


def _sqlstate(error: object) -> str:
    # asyncpg, psycopg; psycopg2 and SQLAlchemy's asyncpg
    code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return code if isinstance(code, str) else ""
