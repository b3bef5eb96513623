"""What PostgreSQL knows of a transaction by its number, and whether it is the same server."""

from __future__ import annotations

import logging
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

logger = logging.getLogger("asgi_dbscope")

SERVER = "asgi_dbscope_server"
"""The key in a pooled connection's ``info`` that says which server it is connected to."""


class TransactionStatus(Enum):
    """What PostgreSQL says of a transaction; the values are its own."""

    IN_PROGRESS = "in progress"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Server(NamedTuple):
    """Which server it is, and since when it has lost nothing.

    Attributes:
        system: The database cluster's own number, which its replicas share.

        unbroken_since: When its statistics began. They are kept over a shutdown, and begin anew
            after a crash; a replica has its own.
    """

    system: str
    unbroken_since: str


class Transaction(NamedTuple):
    """A transaction to ask for.

    Attributes:
        number: Its own.

        server: Where it was begun; ``None`` if that couldn't be told.
    """

    number: int
    server: Server | None


def check_can_resolve(engine: Engine) -> None:
    """Refuse a database that can't be asked what became of a transaction.

    Raises:
        ConfigurationError: If it can't.
    """
    if engine.dialect.name != "postgresql":
        msg = (
            "resolve_in_doubt=True asks PostgreSQL (13 or newer) what became of a transaction; "
            f"{engine.dialect.name} can't be asked. Leave it out: a COMMIT without an answer is a "
            "CommitInDoubtError then, and only the data itself can tell."
        )
        raise ConfigurationError(msg)


def note_server(
    dbapi_connection: DBAPIConnection, connection_record: ConnectionPoolEntry | None
) -> None:
    """Remember which server a new connection is connected to: a crash or failover would end it."""
    assert connection_record is not None
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(
            "SELECT system_identifier::text, (SELECT stats_reset::text FROM pg_stat_bgwriter) "
            "FROM pg_control_system()"
        )
        (row,) = cursor.fetchall()
        connection_record.info[SERVER] = Server(*row)
    except Exception:
        logger.warning(
            "This server can't be told from another one, so a COMMIT without an answer stays in "
            "doubt: resolve_in_doubt needs to read pg_control_system() and pg_stat_bgwriter",
            exc_info=True,
        )
    finally:
        cursor.close()
    dbapi_connection.rollback()


def find_transaction(connection: Connection) -> Transaction | None:
    """The open transaction's number; ``None`` if nothing was written in it."""
    number = connection.exec_driver_sql("SELECT pg_current_xact_id_if_assigned()::text").scalar()
    return None if number is None else Transaction(int(number), connection.info.get(SERVER))


def find_status(
    connection: PoolProxiedConnection, transaction: Transaction
) -> TransactionStatus | None:
    """What became of a transaction; ``None`` if this server's word proves nothing.

    A standby may not have heard of it yet, and is asked again: it may be about to take over.
    """
    now, then = connection.info.get(SERVER), transaction.server
    if now is None or then is None or now.system != then.system:
        return None
    status = _ask(connection, transaction.number)
    if status is TransactionStatus.COMMITTED and now != then:
        return None
    return status


def _ask(connection: PoolProxiedConnection, number: int) -> TransactionStatus | None:
    cursor = connection.cursor()
    try:
        cursor.execute(
            "SELECT CASE WHEN pg_is_in_recovery() THEN 'in progress' "
            f"ELSE pg_xact_status('{number:d}'::xid8) END"
        )
        (row,) = cursor.fetchall()
    except Exception as error:
        if getattr(error, "sqlstate", None) != "22023":
            raise
        # "... is in the future": after a crash that lost it, or on a replica that never got it.
        return TransactionStatus.ABORTED
    finally:
        cursor.close()
    answer: Any = row[0]
    return None if answer is None else TransactionStatus(answer)
