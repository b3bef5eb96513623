"""What each database and driver does in its own way."""

from __future__ import annotations

import os
import re
import socket
from math import ceil
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import text

from asgi_dbscope._text import ascii_line, told
from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

    from asgi_dbscope._policy import Mode

POSTGRESQL = frozenset({"postgresql", "cockroachdb"})
"""Dialects whose server aborts the whole transaction at any error."""

MYSQL = frozenset({"mysql", "mariadb"})
"""The dialects for MariaDB and MySQL: how the URL spells it, not which of them it is."""

UNDO = "asgi_dbscope_undo"
"""The key in a pooled connection's ``info`` whose value is the statement that takes back what would
outlive the transaction."""

TRANSACTION_TIMEOUT_SINCE = (17,)
"""The version of PostgreSQL that knows ``transaction_timeout``."""


_LEVELS = ("", "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")

SET_TRANSACTION = {
    (level, read_only): "SET TRANSACTION "
    + ", ".join(
        filter(None, (level and f"ISOLATION LEVEL {level}", "READ ONLY" if read_only else ""))
    )
    for level in _LEVELS
    for read_only in (False, True)
}
"""MariaDB's statements, by isolation level and whether writes are refused; there are no others."""

HELD_READ_ONLY = "default_transaction_read_only"
"""PostgreSQL's setting for a connection that may only read; since 14 it reports each change."""


_MARIADB_KEEP_LIMITS = (
    "SET @asgi_dbscope_statement = @@SESSION.max_statement_time, "
    "@asgi_dbscope_idle = @@SESSION.idle_transaction_timeout"
)
_MARIADB_FORGET_LIMITS = (
    "SET SESSION max_statement_time = @asgi_dbscope_statement, "
    "SESSION idle_transaction_timeout = @asgi_dbscope_idle"
)

_APPLICATION_NAME = text("SELECT set_config('application_name', :label, true)")


def begin_options(
    dialect: str, *, mode: Mode, isolation_level: str | None, read_only: bool
) -> dict[str, Any]:
    """The execution options that make an engine begin transactions as asked for."""
    if mode == "autocommit":
        return {"isolation_level": "AUTOCOMMIT"}
    options: dict[str, Any] = {}
    if isolation_level is not None and dialect not in MYSQL:  # see shape_transaction()
        options["isolation_level"] = isolation_level
    if read_only and dialect in POSTGRESQL:
        options["postgresql_readonly"] = True  # part of BEGIN, and taken back at checkin
    return options


def check_shape(engine: Engine, *, isolation_level: str | None, read_only: bool | None) -> None:
    """Refuse transactions that the database can't have, without a connection to it.

    Raises:
        ConfigurationError: If one is asked for.
    """
    check_isolation_level(engine, isolation_level)
    dialect = engine.dialect.name
    if read_only and not (dialect in POSTGRESQL or dialect in MYSQL or dialect == "sqlite"):
        msg = (
            f"read_only=True can't be enforced on {dialect} yet, and asgi_dbscope doesn't leave it "
            "to trust. Give the engine a database user that may only read."
        )
        raise ConfigurationError(msg)


def check_isolation_level(engine: Engine, isolation_level: str | None) -> None:
    """Refuse a level that the database doesn't have, before a connection is taken for it.

    Raises:
        ConfigurationError: If it doesn't.
    """
    if isolation_level is None:
        return
    try:
        levels = engine.dialect.get_isolation_level_values(cast("DBAPIConnection", None))
    except NotImplementedError:
        return
    if isolation_level.replace("_", " ").upper() not in levels:
        msg = (
            f"isolation_level={isolation_level!r} is none of {engine.dialect.name}'s: "
            f"{', '.join(level for level in levels if level != 'AUTOCOMMIT')}."
        )
        raise ConfigurationError(msg)


def shape_transaction(
    connection: Connection, *, isolation_level: str | None, read_only: bool
) -> None:
    """Shape the transaction that *connection* has begun, where :func:`begin_options` couldn't.

    Raises:
        ConfigurationError: If the database can't do that.
    """
    check_shape(connection.engine, isolation_level=isolation_level, read_only=read_only)
    dialect = connection.dialect.name
    if dialect in MYSQL:
        # For the one transaction that the next statement begins: one round trip, and nothing is
        # left to take back. The server refuses it inside a transaction, where START TRANSACTION
        # READ ONLY would commit what is there.
        level = (isolation_level or "").replace("_", " ").upper()
        connection.exec_driver_sql(SET_TRANSACTION[level, read_only])
    elif read_only and dialect == "sqlite":
        connection.info[UNDO] = "PRAGMA query_only = OFF"
        connection.exec_driver_sql("PRAGMA query_only = ON")


def limit_transaction(connection: Connection, seconds: float, *, slack: float = 0.0) -> None:
    """Let the server itself end a transaction that takes longer, where it can.

    Also when this process doesn't come back to it: a transaction that idles is ended too, and its
    locks with it; *slack* seconds later, where this process has a clock of its own. The settings
    end with the transaction (postgresql.org, ``SET LOCAL``). MariaDB has such settings for the
    session; :func:`undo_settings` takes them back.
    """
    if getattr(connection.dialect, "is_mariadb", False):
        _limit_mariadb_transaction(connection, seconds, seconds + slack)
        return
    if connection.dialect.name != "postgresql":
        return
    statement, whole = _milliseconds(seconds), _milliseconds(seconds + slack)
    version: tuple[Any, ...] = getattr(connection.dialect, "server_version_info", None) or ()
    if slack and version >= TRANSACTION_TIMEOUT_SINCE:
        connection.exec_driver_sql(  # :d is a number or an error
            f"SELECT set_config('statement_timeout', '{statement:d}', true), "
            f"set_config('idle_in_transaction_session_timeout', '{whole:d}', true), "
            f"set_config('transaction_timeout', '{whole:d}', true)"
        )
        return
    connection.exec_driver_sql(
        f"SELECT set_config('statement_timeout', '{statement:d}', true), "
        f"set_config('idle_in_transaction_session_timeout', '{whole:d}', true)"
    )


def _limit_mariadb_transaction(connection: Connection, statement: float, idle: float) -> None:
    if UNDO not in connection.info:
        connection.info[UNDO] = _MARIADB_FORGET_LIMITS
        connection.exec_driver_sql(_MARIADB_KEEP_LIMITS)
    connection.exec_driver_sql(
        f"SET SESSION max_statement_time = {_milliseconds(statement) / 1000:.3f}, "
        f"SESSION idle_transaction_timeout = {ceil(_milliseconds(idle) / 1000):d}"
    )


def _milliseconds(seconds: float) -> int:
    return min(max(1, round(seconds * 1000)), 2**31 - 1)  # the settings' own limits


CUT = "asgi_dbscope_cut"
"""The name in a pooled connection's ``info`` of whether it was cut: nobody may get it again."""


def cut(connection: Connection) -> bool:
    """Cut the connection of a synchronous driver, from another thread; whether that could be done.

    Whoever waits for the server in it gets an error at once, and the server rolls back. SQLite,
    which has no server, is told to give up the statement that it is at.
    """
    try:
        if is_lost_when_cut(connection.dialect):
            connection.info[CUT] = True  # a driver may not notice before it is used again
        driver: Any = connection.connection.driver_connection
        if hasattr(driver, "interrupt"):  # sqlite3; aiosqlite has one of its own inside
            getattr(driver, "_conn", driver).interrupt()
        else:  # psycopg, psycopg2, mysqlclient; PyMySQL
            place = driver if hasattr(driver, "fileno") else driver._sock  # noqa: SLF001 - no other way
            with socket.socket(fileno=os.dup(place.fileno())) as wire:
                wire.shutdown(socket.SHUT_RDWR)
    except Exception:  # noqa: BLE001 - closed already, or a driver that keeps it to itself
        return False
    return True


def is_lost_when_cut(dialect: Dialect) -> bool:
    """Whether nothing more can be said on a connection after :func:`cut`."""
    return dialect.name != "sqlite"


def stop_thread(connection: Connection) -> None:
    """Let a driver's thread give up the statement whose task is being cancelled.

    aiosqlite's would finish it, and what follows waits for that.
    """
    if connection.dialect.driver == "aiosqlite":
        cut(connection)


def label_transaction(connection: Connection, label: str) -> None:
    """Name the open transaction in ``pg_stat_activity`` and in the server's log."""
    # PostgreSQL keeps 63 bytes, and ASCII only.
    connection.execute(_APPLICATION_NAME, {"label": ascii_line(label)[:63]})


def has_settings(dialect: Dialect) -> bool:
    """Whether there are settings to take back: a listener costs each checkin."""
    return dialect.name not in POSTGRESQL


def undo_settings(
    dbapi_connection: DBAPIConnection,
    connection_record: ConnectionPoolEntry,
    reset_state: PoolResetState,
) -> None:
    """Take the settings that outlive a transaction back before the connection's next user."""
    statement = connection_record.info.pop(UNDO, None)
    if statement is None or reset_state.terminate_only:
        return
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()


def is_autocommit(connection: Connection) -> bool:
    """Whether each statement is durable by itself, so that there is no transaction."""
    level = connection.get_execution_options().get("isolation_level")
    return (level or engine_level(connection.engine)) == "AUTOCOMMIT"


def engine_level(engine: Engine) -> str | None:
    """The isolation level that *engine* was made with, if it was."""
    level = engine.get_execution_options().get("isolation_level")
    return level or getattr(engine.dialect, "_on_connect_isolation_level", None)


def ends_transaction(statement: str) -> bool:
    """Whether *statement* commits or rolls back past SQLAlchemy, by its text.

    What follows it is another transaction, or none.
    """
    return _ENDS_TRANSACTION.search(_NO_VERB.sub(" ", statement)) is not None


_NO_VERB = re.compile(
    r"""--[^\n]* | /\*.*?\*/ | '[^']*' | "[^"]*" | \$(\w*)\$.*?\$\1\$""", re.DOTALL | re.VERBOSE
)
"""Comments, strings, names and PostgreSQL's bodies of functions."""

_ENDS_TRANSACTION = re.compile(
    r"(?:\A|;)\s*(?:COMMIT|END|ABORT|PREPARE\s+TRANSACTION|ROLLBACK(?!(?:\s+\w+)?\s+TO\b))\b",
    re.IGNORECASE,
)


def check_transactional(engine: Engine) -> None:
    """Refuse an engine that is AUTOCOMMIT by itself where a transaction is asked for.

    Raises:
        ConfigurationError: If it is.
    """
    if engine_level(engine) == "AUTOCOMMIT":
        msg = (
            f"{told(engine)} was made with isolation_level='AUTOCOMMIT': there is no transaction "
            "that could be rolled back. Say mode='autocommit', or make the engine without it."
        )
        raise ConfigurationError(msg)


def mixes_up_answers(dialect: Dialect) -> bool:
    """Whether two tasks that read from a connection at once take each other's answers.

    asyncmy wakes only the one that came last: the other waits for ever. asyncpg refuses the second,
    psycopg and aiosqlite let it wait.
    """
    return dialect.name in MYSQL


def begin(connection: Connection) -> None:
    """Begin in the database itself, where the driver would put it off.

    Python's ``sqlite3`` begins only before what starts with INSERT, UPDATE, DELETE or REPLACE. A
    write that starts with WITH would be durable at once; a SAVEPOINT that comes first would be
    SQLite's outermost transaction, and its RELEASE a COMMIT.
    """
    if (
        connection.dialect.name == "sqlite"
        and not is_autocommit(connection)
        and not is_in_transaction(connection.connection.dbapi_connection)
    ):
        connection.exec_driver_sql("BEGIN")


def is_in_transaction(dbapi_connection: Any) -> bool:
    """Whether the driver knows this connection to be inside a transaction; no round trip.

    ``False`` for a driver that can't tell.
    """
    driver = getattr(dbapi_connection, "driver_connection", dbapi_connection)
    try:
        if hasattr(driver, "is_in_transaction"):  # asyncpg
            return bool(driver.is_in_transaction())
        if hasattr(driver, "in_transaction"):  # sqlite3, aiosqlite
            return bool(driver.in_transaction)
        if hasattr(driver, "info"):  # psycopg: IDLE is 0, UNKNOWN (closed) is 4
            return int(driver.info.transaction_status) not in {0, 4}
        if hasattr(driver, "server_status"):  # asyncmy, aiomysql, PyMySQL
            return bool(driver.server_status & 1)
    except Exception:  # noqa: BLE001 - a connection that can't say is closed or broken
        return False
    return False


def is_held_read_only(dbapi_connection: Any) -> bool:
    """Whether the PostgreSQL server refuses writes on this connection; no round trip.

    By its setting, or because it is a replica. The driver has heard of both when they changed.
    """
    driver = getattr(dbapi_connection, "driver_connection", dbapi_connection)
    try:
        if hasattr(driver, "get_settings"):  # asyncpg
            settings = driver.get_settings()
            is_held = settings.default_transaction_read_only == "on"
            return is_held or bool(settings.in_hot_standby == "on")
        status = driver.info.parameter_status  # psycopg
        return "on" in {status(HELD_READ_ONLY), status("in_hot_standby")}
    except Exception:  # noqa: BLE001 - a connection that can't say is closed, broken or too old
        return False
