"""Reads in one round trip: connections that the server itself holds read-only, and no transaction.

A write is refused by the server. What is here says so earlier or more clearly, and finds code that
has taken such a connection out of that state.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, TextClause, event
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import _dialects
from asgi_dbscope._poolers import read_url
from asgi_dbscope._text import told
from asgi_dbscope.errors import ConfigurationError, ReadOnlyError

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.orm import Session
    from sqlalchemy.pool import ConnectionPoolEntry

    from asgi_dbscope._branches import Places
    from asgi_dbscope._pool import SecondConnections
    from asgi_dbscope._scope import SessionScope

_DRIVERS = frozenset({"asyncpg", "psycopg", "psycopg_async"})

_CONTROL = re.compile(
    r"\s*(?:SET|RESET|DISCARD|BEGIN|START|COMMIT|END|ROLLBACK|ABORT)\b", re.IGNORECASE
)
"""Statements about a transaction, or about what follows on the same connection."""

_SETTING = re.compile(
    r"\b(?:set_config|pg_(?:try_)?advisory_xact_lock(?:_shared)?)\s*\(", re.IGNORECASE
)
"""Functions whose effect ends with their transaction, and here with their statement."""


@dataclass(frozen=True, slots=True)
class Reads:
    """Where a database's read-only work goes.

    Attributes:
        engine: Its engine.

        second_connections: Who waits for a second connection of its pool.

        places: How many branches may run in its pool.
    """

    engine: Engine
    second_connections: SecondConnections
    places: Places


def read_only_options(
    url: URL | str, *, connect_args: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """The options of an engine whose connections PostgreSQL itself holds read-only.

    The server is told when they are opened: ``default_transaction_read_only=on``. Their isolation
    level is ``AUTOCOMMIT``: no transaction but where one is asked for. For
    ``Database(engine, reads=...)``::

        url = "postgresql+asyncpg://shop@replica/shop"
        reads = create_async_engine(url, **read_only_options(url, pool_size=20))

    For ``create_engine()`` as well, with psycopg. ``Database(engine, reads=url)`` uses them by
    itself.

    Args:
        url: The engine's; its driver is asyncpg or psycopg.

        connect_args: More for the driver's ``connect()``.

        options: More for the engine; handed back as they are.

    Returns:
        What to give to ``create_async_engine()`` or ``create_engine()`` beside *url*.

    Raises:
        ConfigurationError: If the driver is another one, or an isolation level is among *options*.
    """
    parsed = read_url(url)
    _check_driver(parsed.get_backend_name(), parsed.drivername.rpartition("+")[2])
    if options.setdefault("isolation_level", "AUTOCOMMIT") != "AUTOCOMMIT":
        msg = (
            f"isolation_level={options['isolation_level']!r} can't be chosen for reads: theirs is "
            "AUTOCOMMIT. A request that needs another says session_options(isolation_level=...)."
        )
        raise ConfigurationError(msg)
    given = dict(connect_args or {})
    if parsed.drivername.endswith("asyncpg"):
        settings = given.get("server_settings", {})
        given["server_settings"] = {**settings, _dialects.HELD_READ_ONLY: "on"}
    else:
        said = given.get("options") or " ".join(parsed.normalized_query.get("options", ()))
        given["options"] = f"{said} -c {_dialects.HELD_READ_ONLY}=on".strip()
    return {**options, "connect_args": given}


def check_reads(bind: object, reads: object, *, is_bound_once: bool) -> Engine:
    """The engine that *reads* is, for a database that is bound to *bind*.

    Raises:
        ConfigurationError: If they don't go together.
    """
    main = getattr(bind, "sync_engine", bind)
    if not isinstance(main, Engine) or not is_bound_once:
        msg = "reads needs a session factory that is bound to one engine, and has no binds."
        raise ConfigurationError(msg)
    if not isinstance(reads, (AsyncEngine, Engine)):
        msg = f"reads must be an AsyncEngine or an Engine, or a URL; got {told(reads)}."
        raise ConfigurationError(msg)
    engine = reads.sync_engine if isinstance(reads, AsyncEngine) else reads
    for each in (main, engine):
        _check_driver(each.dialect.name, each.dialect.driver)
    if engine.dialect.is_async is not main.dialect.is_async:
        kind = "an asynchronous" if main.dialect.is_async else "a synchronous"
        msg = f"reads must be {kind} engine, as the database's own is; got {told(engine)}."
        raise ConfigurationError(msg)
    if engine.pool is main.pool:
        msg = (
            "reads is the database's own engine, and its connections would be read-only for "
            "everybody. Make a second one: create_async_engine(url, **read_only_options(url))."
        )
        raise ConfigurationError(msg)
    if not event.contains(engine, "checkin", _forget_what_is_not_held):
        event.listen(engine, "checkin", _forget_what_is_not_held)
    return engine


def _check_driver(dialect: str, driver: str) -> None:
    if dialect == "postgresql" and driver in _DRIVERS:
        return
    msg = (
        "reads is for PostgreSQL, with asyncpg or psycopg: there the server holds a connection "
        f"read-only, and a read without a transaction is one round trip; this is {dialect}+"
        f"{driver}. read_only=True works without reads, too."
    )
    if dialect == "sqlite":
        msg += " On SQLite, which has no round trips, it would only be slower."
    raise ConfigurationError(msg)


# --------------------------------------------------------------------------------------
# Before a statement
# --------------------------------------------------------------------------------------


def check_statement(scope: SessionScope[Any], statement: Any, options: Any) -> None:
    """Refuse what needs a transaction and would get none: silently, or with a puzzling error.

    Raises:
        ConfigurationError: If *statement* does.
    """
    if scope.use is not None and scope.use.is_begun_by_hand:
        return  # a transaction of the code's own
    text = statement.text if isinstance(statement, TextClause) else statement
    if isinstance(text, str):
        found = _CONTROL.match(text) or _SETTING.search(text)
        if found is not None:
            msg = (
                f"{scope!r} reads in one round trip, without a transaction, so "
                f"{found[0].strip(' (').upper()} would hold for nothing after it. Do it, and the "
                f"reads that depend on it, inside of `{scope.database.with_} db.transactional():`, "
                "which is a transaction."
            )
            raise ConfigurationError(msg)
    asked: dict[str, Any] = getattr(statement, "get_execution_options", dict[str, Any])()
    if options:
        asked = {**asked, **options}
    if asked.get("stream_results") or asked.get("yield_per"):
        msg = (
            f"{scope!r} reads in one round trip, and a server-side cursor lives in a transaction. "
            f"Say session_options(stream='hold'), or read it inside of `{scope.database.with_} "
            "db.transactional():`."
        )
        raise ConfigurationError(msg)


def options_on(engine: Engine, execution_options: dict[str, Any]) -> dict[str, Any]:
    """What an engine for reads has to be told, of what another would have to be.

    Without a transaction, nothing: that is how it was made, and to put AUTOCOMMIT on for each
    checkout, and off again, takes SQLAlchemy as long as a tenth of a SELECT.
    """
    if _dialects.engine_level(engine) != "AUTOCOMMIT":
        return execution_options
    if execution_options.get("isolation_level") == "AUTOCOMMIT":
        return {}
    return {"isolation_level": None, **execution_options}


def refuse_write(scope: SessionScope[Any], session: Session) -> None:
    """Refuse a flush that has something to write.

    Raises:
        ReadOnlyError: If it has.
    """
    changed = [*session.new, *session.deleted, *filter(session.is_modified, session.dirty)]
    if changed:
        kinds = ", ".join(sorted({type(each).__name__ for each in changed}))
        msg = f"{scope!r} is read-only, and its session has {kinds} to write. {REMEDY}"
        raise ReadOnlyError(msg)


REMEDY = (
    "Nothing was written. Leave read_only out where a request writes "
    "(session_options(read_only=False), if its method made it read-only), or write in a block of "
    "its own: db.transactional('REQUIRES_NEW')."
)

# --------------------------------------------------------------------------------------
# The connection
# --------------------------------------------------------------------------------------


def check_held(scope: SessionScope[Any], connection: Connection) -> None:
    """Refuse a connection on which a write would be done, and durable at once.

    Raises:
        ConfigurationError: If the server doesn't hold it read-only.
    """
    if _dialects.is_held_read_only(connection.connection.dbapi_connection):
        return
    connection.invalidate()  # the session has it by now, and code that swallows this would go on
    msg = (
        f"{scope!r} got a connection of reads that the server doesn't hold read-only, or doesn't "
        "say so (PostgreSQL 14 and newer do); it wasn't used. Make the engine with "
        "read_only_options(url), or let it be a replica. Behind PgBouncer: ALTER ROLE ... SET "
        "default_transaction_read_only = on, for a role that only reads."
    )
    raise ConfigurationError(msg)


def check_untouched(scope: SessionScope[Any], connections: list[Connection]) -> None:
    """Refuse success where the code took a connection out of its state, and may have written.

    Raises:
        ReadOnlyError: If it did.
    """
    for connection in connections:
        if connection.invalidated or not _dialects.is_autocommit(connection):
            continue
        driver = connection.connection.dbapi_connection
        if not _dialects.is_held_read_only(driver) or _dialects.is_in_transaction(driver):
            msg = (
                f"{scope!r} is read-only, and its connection isn't any more: its code has made it "
                "writable by hand, or begun a transaction by hand, which was rolled back; or the "
                "replica became a primary. What was written before that may be kept. Leave such "
                "statements to a request that isn't read-only."
            )
            raise ReadOnlyError(msg)


def _forget_what_is_not_held(
    dbapi_connection: DBAPIConnection | None, connection_record: ConnectionPoolEntry
) -> None:
    """Never hand out a connection again that the code has made writable."""
    if dbapi_connection is not None and not _dialects.is_held_read_only(dbapi_connection):
        connection_record.invalidate()
