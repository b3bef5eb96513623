"""What tests of your app need: conflicts on demand."""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope._database import Database
from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from sqlalchemy import Connection

_REAL = {
    "postgresql": "DO $$ BEGIN RAISE EXCEPTION 'a conflict that a test asked for' "
    "USING ERRCODE = '40001'; END $$",
    "mariadb": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, "
    "MESSAGE_TEXT = 'a conflict that a test asked for'",
}
_REAL["mysql"] = _REAL["mariadb"]
"""Statements that fail as in a conflict: by the server, which aborts the transaction."""

_EXECUTIONS = ("do_execute", "do_execute_no_params", "do_executemany")

_VERBS = frozenset({"BEGIN", "SAVEPOINT", "RELEASE", "ROLLBACK"})
"""Statements that have no number."""


class InjectedConflicts:
    """What :func:`inject_conflicts` does.

    Attributes:
        count: How many transactions have lost so far.
    """

    def __init__(self, at: str | int, times: int | None) -> None:
        self.count = 0
        self._at = at
        self._times = times
        self._numbers: WeakKeyDictionary[Connection, int] = WeakKeyDictionary()
        self._struck: set[Connection] = set()

    @property
    def listeners(self) -> list[tuple[str, Callable[..., None]]]:
        """The engine's events, and what is done at each."""
        if self._at == "commit":
            return [("commit", self._on_commit)]
        executions = [(name, self._on_execution) for name in _EXECUTIONS]
        return [("begin", self._on_begin), *executions]

    def _on_begin(self, connection: Connection) -> None:
        self._numbers[connection] = 0

    def _on_execution(self, _cursor: Any, statement: str, *rest: Any) -> None:
        connection: Connection = rest[-1].root_connection
        if connection in self._struck:
            return  # the very statement that fails
        number = self._numbers.get(connection, 0)
        if statement.split(maxsplit=1)[0] not in _VERBS:
            number = self._numbers[connection] = number + 1
        if number == self._at or (isinstance(self._at, str) and self._at in statement):
            self._strike(connection)

    def _on_commit(self, connection: Connection) -> None:
        try:
            self._strike(connection)
        except sqlite3.OperationalError as error:  # outside of what SQLAlchemy wraps
            raise OperationalError("COMMIT", None, error) from error

    def _strike(self, connection: Connection) -> None:
        if self._times is not None and self.count >= self._times:
            return
        self.count += 1
        statement = _REAL.get(connection.dialect.name)
        if statement is None:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            error.sqlite_errorname = "SQLITE_BUSY"
            raise error
        self._struck.add(connection)
        try:
            connection.exec_driver_sql(statement)
        finally:
            self._struck.discard(connection)


@contextmanager
def inject_conflicts(
    source: Database[Any] | AsyncEngine | Engine,
    *,
    at: str | int = "commit",
    times: int | None = 1,
) -> Generator[InjectedConflicts]:
    """Let transactions lose as they do in a conflict, while this block is open.

    On PostgreSQL, MariaDB and MySQL it is the server that raises the error, so the transaction is
    really aborted; on SQLite it is the error of a database that is locked.

    Args:
        source: The database, with its engine for reads if it has one, or an engine.

        at: ``"commit"``; or a part of a statement's text, such as ``"UPDATE account"``; or the
            number of a statement in its transaction, from 1; savepoints don't count.

        times: How many transactions lose. ``None``: every one.

    Raises:
        ConfigurationError: If the database isn't one of these.
    """
    engines = [_engine_of(source)]
    if isinstance(source, Database) and source.reads is not None:
        engines.append(source.reads.engine)
    injected = InjectedConflicts(at, times)
    targets = [(engine, *each) for engine in engines for each in injected.listeners]
    for target in targets:
        event.listen(*target)
    try:
        yield injected
    finally:
        for target in targets:
            event.remove(*target)


def _engine_of(source: Any) -> Engine:
    bind = source.session_factory.kw.get("bind") if isinstance(source, Database) else source
    engine = bind.sync_engine if isinstance(bind, AsyncEngine) else bind
    if not isinstance(engine, Engine):
        msg = (
            f"inject_conflicts() takes a Database bound to an engine, or an engine; got {source!r}."
        )
        raise ConfigurationError(msg)
    if engine.dialect.name not in {*_REAL, "sqlite"}:
        msg = (
            f"Conflicts can't be injected into {engine.dialect.name}, only into PostgreSQL, "
            "MariaDB, MySQL and SQLite."
        )
        raise ConfigurationError(msg)
    return engine
