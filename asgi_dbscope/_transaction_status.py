"""What PostgreSQL knows of a transaction, by its number."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.pool import PoolProxiedConnection


class TransactionStatus(Enum):
    """What PostgreSQL says of a transaction; the values are its own."""

    IN_PROGRESS = "in progress"
    COMMITTED = "committed"
    ABORTED = "aborted"


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


def find_transaction_id(connection: Connection) -> int | None:
    """The number of the open transaction; ``None`` if nothing was written in it."""
    known = connection.exec_driver_sql("SELECT pg_current_xact_id_if_assigned()::text").scalar()
    return None if known is None else int(known)


def find_status(connection: PoolProxiedConnection, transaction_id: int) -> TransactionStatus | None:
    """What became of a transaction; ``None`` if it is too long ago.

    A standby may not have heard of it yet, and is asked again: it may be about to take over.
    """
    cursor = connection.cursor()
    try:
        cursor.execute(
            "SELECT CASE WHEN pg_is_in_recovery() THEN 'in progress' "
            f"ELSE pg_xact_status('{transaction_id:d}'::xid8) END"
        )
        (row,) = cursor.fetchall()
    finally:
        cursor.close()
    return None if row[0] is None else TransactionStatus(row[0])


def is_unknown_transaction(error: BaseException) -> bool:
    """Whether the server says that there never was such a transaction: it is another server."""
    return getattr(error, "sqlstate", None) == "22023"  # "... is in the future"
