"""Statements that no rollback undoes, and that therefore must not be executed twice.

Looked for only where work is done again after a conflict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import TextClause

from asgi_dbscope import _dialects
from asgi_dbscope._retry import AUTOCOMMITTED, COMMITTED

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from asgi_dbscope._scope import SessionScope


def fence_write(scope: SessionScope[Any], statement: object = None) -> None:
    """A session, or its connection, executes what is no read: a flush, or *statement*."""
    text = statement.text if isinstance(statement, TextClause) else statement
    if scope.is_autocommitting:
        scope.forbid_attempts(AUTOCOMMITTED)
    elif isinstance(text, str) and _dialects.ends_transaction(text):
        scope.forbid_attempts(COMMITTED)


def fence_connection(scope: SessionScope[Any], connection: Connection) -> None:
    """The user has asked for *connection*: see whether a rollback would undo what is done on it."""
    if _dialects.is_autocommit(connection) and not scope.shape.reads_at_once:
        scope.forbid_attempts(AUTOCOMMITTED)
