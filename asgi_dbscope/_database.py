"""A database: its engine, its session factory, and the verbs of its current scope."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.util import ScopedRegistry

from asgi_dbscope import _current, _dialects
from asgi_dbscope._blocks import SessionHandle, SessionScopeBlock, looks_like_coroutine_function
from asgi_dbscope._engine import shape_engine, watch, watch_engine
from asgi_dbscope._factory import make_engine, reporting_factory
from asgi_dbscope._options import ScopeOptions
from asgi_dbscope._policy import Cause
from asgi_dbscope.errors import ConfigurationError, NoSessionScopeError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, Engine

    from asgi_dbscope._policy import Mode
    from asgi_dbscope._scope import SessionScope
    from asgi_dbscope._use import SessionUse

S = TypeVar("S", bound=AsyncSession)


class Database(Generic[S]):
    """One database: where sessions come from, and the verbs of the current scope.

    Args:
        source: An ``AsyncEngine``; a URL, for an engine of its own, disposed of at lifespan
            shutdown; or an ``async_sessionmaker``, whose session class is kept.

        name: What ``current_session(name)`` calls it.

        mode: The mode of its scopes; see :class:`.DBSessionMiddleware`.

        cleanup_timeout: Seconds that a clean-up (a rollback, the wait for child tasks) may take
            before the connection is thrown away.

    Raises:
        ConfigurationError: If an argument is wrong.
    """

    @overload
    def __init__(
        self: Database[AsyncSession],
        source: AsyncEngine | URL | str,
        *,
        name: str = ...,
        mode: Mode = ...,
        cleanup_timeout: float = ...,
    ) -> None: ...

    @overload
    def __init__(
        self,
        source: async_sessionmaker[S],
        *,
        name: str = ...,
        mode: Mode = ...,
        cleanup_timeout: float = ...,
    ) -> None: ...

    def __init__(
        self,
        source: AsyncEngine | URL | str | async_sessionmaker[Any],
        *,
        name: str = "default",
        mode: Mode = "transaction",
        cleanup_timeout: float = 10.0,
    ) -> None:
        if not isinstance(name, str) or not name:
            msg = f"name must be a string that is not empty; got {name!r}."
            raise ConfigurationError(msg)
        if not isinstance(cleanup_timeout, (int, float)) or not cleanup_timeout > 0:
            msg = f"cleanup_timeout must be a number of seconds above 0; got {cleanup_timeout!r}."
            raise ConfigurationError(msg)
        self.name = name
        self.options = ScopeOptions(mode=mode)
        self.cleanup_timeout = float(cleanup_timeout)
        self.owned_engine: AsyncEngine | None = None
        if isinstance(source, (str, URL)):
            source = self.owned_engine = make_engine(source)
        self.session_factory: async_sessionmaker[S] = reporting_factory(source)
        self._shaped_engines: dict[tuple[Engine, tuple[tuple[str, Any], ...]], Engine] = {}
        dialect = getattr(self.session_factory.kw.get("bind"), "dialect", None)
        self.begins_late = getattr(dialect, "name", None) == "sqlite"
        self._watched_dialects: set[Dialect] = set()
        self._session_proxy: async_scoped_session[S] | None = None

    def __repr__(self) -> str:
        return f"<Database {self.name!r} {self.session_factory.kw.get('bind')!r}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        """Itself: Litestar copies what its controllers and routers are given."""
        return self

    # ---------------------------------------------------------------- the current scope

    @property
    def scope(self) -> SessionScope[S]:
        """The current scope of this database.

        Raises:
            NoSessionScopeError: If none is open here.
        """
        scope = _current.find_scope(self)
        if scope is None:
            raise NoSessionScopeError(_current.no_scope_message(self.name))
        return scope

    @property
    def session(self) -> S:
        """The session of the current scope, made at its first use.

        Raises:
            NoSessionScopeError: If no scope is open here.
            SessionScopeClosedError: If the scope has ended.
            WebSocketSessionError: In a websocket, outside ``async with db.session_scope()``.
        """
        return self.scope.session

    @looks_like_coroutine_function
    def get_session(self) -> SessionHandle[S]:
        """The session of the current scope, for whoever wants to be handed it.

        One callable for both protocols: FastAPI's ``Depends(db.get_session)`` and Litestar's
        ``Provide(db.get_session)`` await it; ``async with db.get_session() as session:`` works
        inside a request (it joins the scope and ends nothing) and outside (it opens a scope of
        its own, committed at its end).
        """
        return SessionHandle(self)

    @property
    def session_proxy(self) -> async_scoped_session[S]:
        """A session that stands for the current scope's, for objects built once at import."""
        if self._session_proxy is None:
            proxy = async_scoped_session(self.session_factory, scopefunc=lambda: None)
            proxy.registry = _CurrentSession(self)
            self._session_proxy = proxy
        return self._session_proxy

    def set_rollback_only(self) -> None:
        """Forbid the current scope to commit; see :meth:`.SessionScope.set_rollback_only`."""
        self.scope.set_rollback_only()

    async def release(self) -> None:
        """Commit what is open and give the connection back, before a slow call elsewhere.

        The session stays usable: its next statement begins a new transaction. A rollback-only
        scope is rolled back instead.

        Raises:
            NoSessionScopeError: If no scope is open here.
            Exception: What the database said to COMMIT; the transaction is rolled back by then.
        """
        scope = self.scope
        scope.check_open()
        cancellation = await scope.settle(scope.decide(Cause.RELEASED))
        if cancellation is not None:
            raise cancellation

    # ---------------------------------------------------------------- scopes of their own

    def session_scope(
        self,
        *,
        mode: Mode | None = None,
        read_only: bool = False,
        isolation_level: str | None = None,
    ) -> SessionScopeBlock[S]:
        """A scope of its own: for a script, a job, a websocket's message, a test.

        Committed at its end, rolled back if it raises or is cancelled. A context manager, and a
        decorator for coroutine functions; a fresh scope at each entry. Inside a request it is
        independent of the request's scope, with a connection of its own.

        Args:
            mode: Instead of the database's.

            read_only: Whether the database itself refuses writes.

            isolation_level: As SQLAlchemy spells it.
        """
        changes: dict[str, Any] = {"read_only": read_only, "isolation_level": isolation_level}
        if mode is not None:
            changes["mode"] = mode
        return SessionScopeBlock(self, changes)

    # ---------------------------------------------------------------- for the scope

    def make_session(self, use: SessionUse) -> S:
        """A new session that reports to *use*."""
        session = self.session_factory()
        session.sync_session.use = use  # type: ignore[attr-defined]
        return session

    def watch(self, connection: Connection, scope: SessionScope[S]) -> None:
        """Report to *scope* what goes wrong on *connection*."""
        if connection.dialect not in self._watched_dialects:
            watch_engine(connection.engine)
            self._watched_dialects.add(connection.dialect)
        watch(connection, scope)

    def shaped_engine(self, engine: Engine, execution_options: dict[str, Any]) -> Engine:
        """The variant of *engine* with *execution_options*, made once."""
        key = (engine, tuple(execution_options.items()))
        shaped = self._shaped_engines.get(key)
        if shaped is None:
            _dialects.check_isolation_level(engine, execution_options.get("isolation_level"))
            shaped = self._shaped_engines[key] = shape_engine(engine, execution_options)
        return shaped

    async def dispose(self) -> None:
        """Close the connections of an engine that this object made from a URL."""
        if self.owned_engine is not None:
            await self.owned_engine.dispose()


class _CurrentSession(ScopedRegistry[S]):
    """The registry of a ``session_proxy``: the current scope is the only one it knows."""

    def __init__(self, database: Database[S]) -> None:
        super().__init__(database.session_factory, lambda: None)
        self._database = database

    def __call__(self) -> S:
        return self._database.session

    def has(self) -> bool:
        # So that session_proxy.remove() leaves the session to its scope.
        return False

    def set(self, obj: S) -> None:  # noqa: ARG002 - the base class's signature
        msg = "The session of a scope can't be configured through session_proxy; use db.session."
        raise ConfigurationError(msg)

    def clear(self) -> None:
        """Do nothing: the scope ends its session."""
