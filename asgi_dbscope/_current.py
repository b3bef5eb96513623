"""Which scope is the current one: a context variable over a chain of scope holders.

The variable holds one mutable object, so a child task, a worker thread and code behind
``BaseHTTPMiddleware`` all see the very same one through their copy of the context. It is set and
reset only by whoever opens the scope. A holder is a request, which makes a database's scope when
that is asked for, or a scope by itself; each links to the one around it, and a database's current
scope is the innermost one of the chain. A call that may be made again is one, too, so that all that
is done in it, in whichever scope, knows the attempt that it is a part of.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import ContextVar
from inspect import Signature
from math import inf
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy.ext.asyncio import AsyncSession

from asgi_dbscope.errors import AmbiguousDatabaseError, NoSessionScopeError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from contextvars import Token
    from typing import Protocol

    from asgi_dbscope._admission import AdmittedRequest
    from asgi_dbscope._boundary import Boundary
    from asgi_dbscope._database import Database
    from asgi_dbscope._retry import Attempt
    from asgi_dbscope._scope import SessionScope

    class ScopeHolder(Protocol):
        """A request, a scope by itself, or a call that may be made again."""

        outer: ScopeHolder | None
        """The holder around this one."""

        @property
        def scopes(self) -> Sequence[SessionScope[Any]]:
            """The scopes that were asked for here."""
            ...

        @property
        def is_over(self) -> bool:
            """Whether it has ended."""
            ...

        @property
        def is_request(self) -> bool:
            """Whether it is a request."""
            ...

        @property
        def loop(self) -> asyncio.AbstractEventLoop | None:
            """The event loop it was opened in; ``None`` outside of asyncio."""
            ...

        @property
        def current_attempt(self) -> Attempt | None:
            """What is known of its attempts, where it may be done again after a conflict."""
            ...

        @property
        def admitted_request(self) -> AdmittedRequest | None:
            """The request that has to ask for a place, where requests do."""
            ...

        def take_late_hooks(self, scope: SessionScope[Any]) -> bool:
            """Run the hooks of *scope* that wait for the response; whether it is up to that."""
            ...

        @property
        def databases(self) -> Collection[Database[Any]]:
            """The databases that have a scope here."""
            ...

        def find(self, database: Database[Any]) -> SessionScope[Any] | None:
            """The scope of *database* here, if it has one."""
            ...


innermost: ContextVar[ScopeHolder | None] = ContextVar("asgi_dbscope", default=None)
"""The innermost holder; ``None`` outside of any scope."""

get_innermost, set_innermost, reset_innermost = innermost.get, innermost.set, innermost.reset
"""Bound once: binding them costs a request more than calling them."""


def open_around(holder: ScopeHolder | None) -> ScopeHolder | None:
    """*holder*, or the next one around it that hasn't ended; those that have are let go of.

    A task is born in the context of whoever started it, and servers read a connection's next
    request in that of the one before: what has ended there is around nobody, and would be kept.
    """
    while holder is not None and holder.is_over:
        holder = holder.outer
    if holder is not None and holder.outer is not None:
        holder.outer = open_around(holder.outer)
    return holder


innermost_block: ContextVar[Any] = ContextVar("asgi_dbscope_block", default=None)
"""The innermost transactional block entered in this context, linked to those around it."""


def leave_innermost(variable: ContextVar[Any], entry: Any, token: Token[Any]) -> bool:
    """Let what was around *entry* be the innermost one again; whether *entry* was it here.

    It isn't where it is left in another context than entered (a fixture's exit, a generator's), or
    before one inside of it; then whoever is inside puts it right.
    """
    if variable.get() is not entry:
        return False
    try:
        variable.reset(token)
    except ValueError:  # a copy of the context that it was entered in
        variable.set(entry.outer)
    return True


def is_of_another_task(boundary: Boundary) -> bool:
    """Whether a block is open in another task, and this code is not inside of it.

    A block whose task is over was opened in a generator that is driven from elsewhere.
    """
    task = boundary.task
    if task is None or task.done() or task is asyncio.current_task():
        return False
    entered = innermost_block.get()
    while entered is not None:
        if entered.boundary is boundary:
            return False
        entered = entered.outer
    return True


def find_scope(database: Database[Any]) -> SessionScope[Any] | None:
    """The innermost scope of *database*, open or closed; ``None`` outside of any."""
    holder = innermost.get()
    while holder is not None:
        scope = holder.find(database)
        if scope is not None:
            return scope
        holder = holder.outer
    return None


def find_attempt() -> Attempt | None:
    """The attempt that this code is a part of: the innermost of those it was called in.

    Also one that has lost, whose task this is. But what is over for good is left out, as it is in
    :func:`open_around`: a task may well go on in its context.
    """
    holder = innermost.get()
    attempt = None if holder is None else holder.current_attempt
    return None if attempt is None else attempt.alive


def due_around(holder: ScopeHolder | None) -> float:
    """When the first of the transactions that are open around has to be over; ``inf``: whenever."""
    due_at = inf
    while holder is not None:
        due_at = min(due_at, *(scope.due_at for scope in holder.scopes), inf)
        holder = holder.outer
    return due_at


def forbid_attempts(reason: str, own: Attempt | None = None) -> None:
    """Let nothing be done again that this code is a part of, nor what *own* is an attempt at."""
    for attempt in (find_attempt(), own):
        if attempt is not None:
            attempt.forbid(reason)


def current_scope(name: str | None = None) -> SessionScope[Any]:
    """The current session scope.

    Args:
        name: The database's name. May be left out where only one database has a scope.

    Raises:
        NoSessionScopeError: If no scope is open here, or none of that name.
        AmbiguousDatabaseError: If *name* is left out and several databases have one.
    """
    holder = innermost.get()
    if holder is not None and holder.outer is None and len(holder.databases) == 1:  # as in most
        [database] = holder.databases
        if name is None or database.name == name:
            scope = holder.find(database)
            assert scope is not None
            return scope
    found: dict[Database[Any], ScopeHolder] = {}
    while holder is not None:
        for database in holder.databases:
            if name is None or database.name == name:
                found.setdefault(database, holder)
        holder = holder.outer
    if len(found) == 1:
        [(database, holder)] = found.items()
        scope = holder.find(database)
        assert scope is not None
        return scope
    if found:
        raise AmbiguousDatabaseError(_ambiguous_message(found))
    raise NoSessionScopeError(no_scope_message(name))


known: WeakSet[Database[Any]] = WeakSet()
"""Every database there is."""


def find_database(name: str | None = None) -> Database[Any]:
    """The database that has a scope here, or outside of any scope the only one there is.

    Args:
        name: The database's name. May be left out where there is only one.

    Raises:
        NoSessionScopeError: If there is none, or none of that name.
        AmbiguousDatabaseError: If *name* is left out and there are several.
    """
    with suppress(NoSessionScopeError):
        return current_scope(name).database
    found = [each for each in known if name is None or each.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise AmbiguousDatabaseError(_ambiguous_message(found))
    raise NoSessionScopeError(no_scope_message(name))


def _ambiguous_message(found: Iterable[Database[Any]]) -> str:
    names = ", ".join(sorted(repr(each.name) for each in found))
    return (
        f"Several databases could be meant here: {names}. Name one, as in "
        "current_session('reports'), or use the Database object: db.session. A name is given "
        "with Database(engine, name='reports')."
    )


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


# Frameworks that are handed this function would fill in its argument: FastAPI from the query, so
# that the client chooses the database.
current_session.__signature__ = Signature(return_annotation=AsyncSession)  # type: ignore[attr-defined]


def no_scope_message(name: str | None) -> str:
    """What to tell a user who asked for a session outside of any scope."""
    holder = innermost.get()
    others: list[str] = []
    while holder is not None:
        others += [repr(database.name) for database in holder.databases]
        holder = holder.outer
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
