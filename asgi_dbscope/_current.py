"""Which scope is the current one: a context variable over a chain of scopes.

The variable holds a scope, a mutable object, so a child task, a worker thread and code behind
``BaseHTTPMiddleware`` all see the very same one through their copy of the context. It is set and
reset only by whoever opens the scope. Each scope links to the one around it; a database's current
scope is the innermost of the chain that is the database's.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from asgi_dbscope.errors import AmbiguousDatabaseError, NoSessionScopeError

if TYPE_CHECKING:
    from typing import Any

    from sqlalchemy.ext.asyncio import AsyncSession

    from asgi_dbscope._scope import SessionScope

innermost: ContextVar[SessionScope[Any] | None] = ContextVar("asgi_dbscope", default=None)
"""The innermost scope; ``None`` outside of any."""


def find_scope(database: object) -> SessionScope[Any] | None:
    """The innermost scope of *database*, open or closed; ``None`` outside of any."""
    scope = innermost.get()
    while scope is not None and scope.database is not database:
        scope = scope.outer
    return scope


def current_scope(name: str | None = None) -> SessionScope[Any]:
    """The current session scope.

    Args:
        name: The database's name. May be left out where only one database has a scope.

    Raises:
        NoSessionScopeError: If no scope is open here, or none of that name.
        AmbiguousDatabaseError: If *name* is left out and several databases have one.
    """
    found: dict[object, SessionScope[Any]] = {}
    scope = innermost.get()
    while scope is not None:
        if name is None or scope.database.name == name:
            found.setdefault(scope.database, scope)
        scope = scope.outer
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        names = ", ".join(sorted(repr(each.database.name) for each in found.values()))
        msg = (
            f"Several databases have a session scope here: {names}. Name one, as in "
            "current_session('reports'), or use the Database object: db.session. A name is given "
            "with Database(engine, name='reports')."
        )
        raise AmbiguousDatabaseError(msg)
    raise NoSessionScopeError(no_scope_message(name))


def current_session(name: str | None = None) -> AsyncSession:
    """The session of the current scope, made at its first use.

    Args:
        name: The database's name. May be left out where only one database has a scope.

    Raises:
        NoSessionScopeError: If no scope is open here, or none of that name.
        AmbiguousDatabaseError: If *name* is left out and several databases have one.
        SessionScopeClosedError: If the scope has ended.
        WebSocketSessionError: In a websocket, outside ``async with db.session_scope()``.
    """
    session: AsyncSession = current_scope(name).session
    return session


def no_scope_message(name: str | None) -> str:
    """What to tell a user who asked for a session outside of any scope."""
    scope = innermost.get()
    others: list[str] = []
    while scope is not None:
        others.append(repr(scope.database.name))
        scope = scope.outer
    if others:
        return (
            f"No session scope is open here for the database {name!r}; there is one for "
            f"{', '.join(sorted(set(others)))}. Is the name right, and was this very Database "
            "object given to the middleware: add_middleware(DBSessionMiddleware, database=db)?"
        )
    return (
        "No session scope is open here. Inside a request: is DBSessionMiddleware added to this "
        "app, and the path not excluded? Elsewhere (a script, a job, a test): use `async with "
        "db.session_scope() as session:`. In a thread started by hand: run it in a copy of the "
        "context, as asyncio.to_thread() does."
    )
