"""A database: its engine, its session factory, and the verbs of its current scope."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast, get_args, overload
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
from sqlalchemy import URL, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from asgi_dbscope import _branches, _current, _dialects
from asgi_dbscope._agenda import Occasion
from asgi_dbscope._blocks import SessionHandle, SessionScopeBlock, looks_like_coroutine_function
from asgi_dbscope._checkout import BoundedEngine
from asgi_dbscope._engine import (
    ShapedEngine,
    comment_statements,
    dispose_in_time,
    shape_engine,
    watch,
    watch_engine,
)
from asgi_dbscope._factory import check_pooler, make_engine, reporting_factory
from asgi_dbscope._hooks import HookRegistrar
from asgi_dbscope._options import (
    Concurrency,
    LabelTransactions,
    ScopeOptions,
    check_choice,
    check_seconds,
)
from asgi_dbscope._policy import Cause
from asgi_dbscope._pool import THREADS, SecondConnections, ThreadWork
from asgi_dbscope._propagation import Propagation, PropagationName
from asgi_dbscope._reads import Reads, check_reads
from asgi_dbscope._session_proxy import SessionProxy
from asgi_dbscope._text import told
from asgi_dbscope._transaction_status import check_can_resolve, note_server
from asgi_dbscope._transactional import TransactionalBlock
from asgi_dbscope.errors import ConfigurationError, NoSessionScopeError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable

    from sqlalchemy import Connection, Dialect

    from asgi_dbscope._policy import Mode
    from asgi_dbscope._poolers import Pooler
    from asgi_dbscope._retry import Retry
    from asgi_dbscope._scope import SessionScope

F = TypeVar("F", bound="Callable[..., Any]")
S = TypeVar("S", bound="AsyncSession | Session")
AS = TypeVar("AS", bound=AsyncSession)
SS = TypeVar("SS", bound=Session)


class Database(Generic[S]):
    """One database: where sessions come from, and the verbs of the current scope.

    Args:
        source: An ``AsyncEngine``; a URL, for an engine of its own, disposed of at lifespan
            shutdown; or an ``async_sessionmaker``, whose session class is kept. An ``Engine``, a
            ``sessionmaker`` or the URL of a synchronous driver gives the same for synchronous
            sessions: ``with`` in the place of ``async with``, ``def`` of ``async def``.

        name: What ``current_session(name)`` calls it.

        mode: The mode of its scopes; see :class:`.DBSessionMiddleware`.

        concurrency: What becomes of two tasks that use one session at the same time: ``"error"``
            refuses the second, ``"serialize"`` lets it wait for its turn.

        label_transactions: Where the database shows what a transaction serves (the label of its
            block, or ``GET /orders``): ``"application_name"``, in PostgreSQL's
            ``pg_stat_activity``, at the price of a statement; or ``"comment"``, the label of its
            block at the end of each statement. ``None``: nowhere.

        cleanup_timeout: Seconds that a clean-up (a rollback, the wait for child tasks) may take
            before the connection is thrown away.

        pooler: ``"pgbouncer"`` where *source* is the URL of a PgBouncer in transaction mode; an
            engine of your own is made with :func:`.pgbouncer_options`.

        resolve_in_doubt: Whether a COMMIT whose connection was lost is asked for on another one,
            *cleanup_timeout* seconds at most. PostgreSQL only; costs each transaction that has
            written one round trip.

        checkout_timeout: Seconds that a session may wait for its connection: for a place in the
            pool, and for the database to answer. ``None`` leaves both to the engine's own limits.

        idle_warning: Seconds after which a transaction that idles, and holds its connection, is
            told of in the log: once for each place in the code.

        idle_timeout: Seconds after which such a transaction is rolled back. The next use of the
            session, or the response, is a :class:`.TransactionIdleError`.

        reads: An engine (see :func:`.read_only_options`), or a URL for one of its own, where
            read-only scopes read in one round trip: each statement by itself, without a
            transaction, on a connection that PostgreSQL holds read-only. It may be a replica's.

    Raises:
        ConfigurationError: If an argument is wrong.
    """

    owned_reads: AsyncEngine | Engine | None = None
    """The engine of its reads, if it has made that from a URL."""

    @overload
    def __init__(
        self: Database[AsyncSession],
        source: AsyncEngine | URL | str,
        *,
        name: str = ...,
        mode: Mode = ...,
        concurrency: Concurrency = ...,
        label_transactions: LabelTransactions | None = ...,
        cleanup_timeout: float = ...,
        pooler: Pooler | None = ...,
        resolve_in_doubt: bool = ...,
        checkout_timeout: float | None = ...,
        idle_warning: float | None = ...,
        idle_timeout: float | None = ...,
        reads: AsyncEngine | URL | str | None = ...,
    ) -> None: ...

    @overload
    def __init__(
        self: Database[Session],
        source: Engine,
        *,
        name: str = ...,
        mode: Mode = ...,
        concurrency: Concurrency = ...,
        label_transactions: LabelTransactions | None = ...,
        cleanup_timeout: float = ...,
        resolve_in_doubt: bool = ...,
        checkout_timeout: float | None = ...,
        idle_warning: float | None = ...,
        idle_timeout: float | None = ...,
        reads: Engine | URL | str | None = ...,
    ) -> None: ...

    @overload
    def __init__(
        self: Database[AS],
        source: async_sessionmaker[AS],
        *,
        name: str = ...,
        mode: Mode = ...,
        concurrency: Concurrency = ...,
        label_transactions: LabelTransactions | None = ...,
        cleanup_timeout: float = ...,
        resolve_in_doubt: bool = ...,
        checkout_timeout: float | None = ...,
        idle_warning: float | None = ...,
        idle_timeout: float | None = ...,
        reads: AsyncEngine | URL | str | None = ...,
    ) -> None: ...

    @overload
    def __init__(
        self: Database[SS],
        source: sessionmaker[SS],
        *,
        name: str = ...,
        mode: Mode = ...,
        concurrency: Concurrency = ...,
        label_transactions: LabelTransactions | None = ...,
        cleanup_timeout: float = ...,
        resolve_in_doubt: bool = ...,
        checkout_timeout: float | None = ...,
        idle_warning: float | None = ...,
        idle_timeout: float | None = ...,
        reads: Engine | URL | str | None = ...,
    ) -> None: ...

    def __init__(
        self,
        source: AsyncEngine | Engine | URL | str | async_sessionmaker[Any] | sessionmaker[Any],
        *,
        name: str = "default",
        mode: Mode = "transaction",
        concurrency: Concurrency = "error",
        label_transactions: LabelTransactions | None = None,
        cleanup_timeout: float = 10.0,
        pooler: Pooler | None = None,
        resolve_in_doubt: bool = False,
        checkout_timeout: float | None = None,
        idle_warning: float | None = None,
        idle_timeout: float | None = None,
        reads: AsyncEngine | Engine | URL | str | None = None,
    ) -> None:
        _check_name(name)
        check_choice("concurrency", concurrency, get_args(Concurrency))
        self.name = name
        self.options = ScopeOptions(
            mode=mode,
            checkout_timeout=checkout_timeout,
            idle_warning=idle_warning,
            idle_timeout=idle_timeout,
            has_reads=reads is not None,
        )
        self.idle_places: set[object] = set()
        self.concurrency = concurrency
        self.label_transactions = label_transactions
        self.cleanup_timeout = check_seconds("cleanup_timeout", cleanup_timeout)
        self.resolve_in_doubt = resolve_in_doubt
        self.owned_engine: AsyncEngine | Engine | None = None
        check_pooler(pooler, source)
        if isinstance(source, (str, URL)):
            source = self.owned_engine = make_engine(source, pooler)
        self.session_factory: Any = reporting_factory(source)
        self.is_sync = isinstance(self.session_factory, sessionmaker)
        self.with_ = "with" if self.is_sync else "async with"
        self._shaped_engines: dict[tuple[Engine, tuple[tuple[str, Any], ...]], Engine] = {}
        bind = self.session_factory.kw.get("bind")
        self.engine = getattr(bind, "sync_engine", bind)
        self.begins_late = getattr(getattr(bind, "dialect", None), "name", None) == "sqlite"
        self.second_connections = SecondConnections(bind)
        self.places = _branches.Places()
        self._watched_dialects: set[Dialect] = set()
        self._transactional_engine: Engine | None = None
        self._limiters: WeakKeyDictionary[
            asyncio.AbstractEventLoop, dict[ThreadWork, anyio.CapacityLimiter]
        ] = WeakKeyDictionary()
        self._check_options(bind)
        self.reads = None if reads is None else self._make_reads(bind, reads, pooler)
        _current.known.add(self)

    def _make_reads(self, bind: object, reads: object, pooler: Pooler | None) -> Reads:
        if isinstance(reads, (str, URL)):
            reads = self.owned_reads = make_engine(reads, pooler, reads_for=self.is_sync)
        is_bound_once = not self.session_factory.kw.get("binds")
        engine = check_reads(bind, reads, is_bound_once=is_bound_once)
        if self.label_transactions == "comment":
            comment_statements(engine)
        if self.resolve_in_doubt and not event.contains(engine, "connect", note_server):
            event.listen(engine, "connect", note_server)
        return Reads(engine, SecondConnections(engine, of_reads=True), _branches.Places())

    def _check_options(self, bind: object) -> None:
        self._check_label_transactions(bind)
        self._check_resolve_in_doubt(bind)

    def _check_label_transactions(self, bind: object) -> None:
        if self.label_transactions is None:
            return
        check_choice("label_transactions", self.label_transactions, get_args(LabelTransactions))
        engine = getattr(bind, "sync_engine", bind)
        if not isinstance(engine, Engine):
            msg = "label_transactions needs a session factory that is bound to an engine."
            raise ConfigurationError(msg)
        if self.label_transactions == "comment":
            comment_statements(engine)
        elif engine.dialect.name != "postgresql":
            msg = (
                f"label_transactions='application_name' is PostgreSQL's; on {engine.dialect.name} "
                "use 'comment'."
            )
            raise ConfigurationError(msg)

    def _check_resolve_in_doubt(self, bind: object) -> None:
        if not isinstance(self.resolve_in_doubt, bool):
            msg = f"resolve_in_doubt must be True or False; got {self.resolve_in_doubt!r}."
            raise ConfigurationError(msg)
        if not self.resolve_in_doubt:
            return
        engine = getattr(bind, "sync_engine", bind)
        if not isinstance(engine, Engine):
            msg = "resolve_in_doubt needs a session factory that is bound to an engine."
            raise ConfigurationError(msg)
        check_can_resolve(engine)
        if not event.contains(engine, "connect", note_server):
            event.listen(engine, "connect", note_server)

    def __repr__(self) -> str:
        return f"<Database {self.name!r} {told(self.session_factory.kw.get('bind'))}>"

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

    session_proxy = SessionProxy()
    """A session that stands for the current scope's, for objects built once at import.

    An ``async_scoped_session``, or a ``scoped_session`` where the database is synchronous.
    """

    def set_rollback_only(self) -> None:
        """Forbid the current scope to commit; see :meth:`.SessionScope.set_rollback_only`."""
        self.scope.set_rollback_only()

    @overload
    def release(self: Database[AS]) -> Coroutine[Any, Any, None]: ...

    @overload
    def release(self: Database[SS]) -> None: ...

    def release(self) -> Any:
        """Commit what is open and give the connection back, before a slow call elsewhere.

        The session stays usable: its next statement begins a new transaction. A rollback-only
        scope is rolled back instead. To be awaited where the database is asynchronous.

        Raises:
            NoSessionScopeError: If no scope is open here.
            ConfigurationError: Inside a block with a transaction or savepoint of its own, whose
                end that isn't.
            Exception: What the database said to COMMIT; the transaction is rolled back by then.
        """
        if self.is_sync:
            scope = self._to_release()
            scope.settle_here(scope.decide(Cause.RELEASED))
            return None
        return self._release()

    async def _release(self) -> None:
        scope = self._to_release()
        cancellation = await scope.settle(scope.decide(Cause.RELEASED))
        if cancellation is not None:
            raise cancellation

    def _to_release(self) -> SessionScope[Any]:
        scope = self.scope
        scope.check_open()
        if scope.boundaries:
            msg = (
                f"release() would commit {scope.boundaries[-1].label} before its end. Call it "
                "outside of the transactional block, or leave the block first."
            )
            raise ConfigurationError(msg)
        return scope

    # ---------------------------------------------------------------- scopes of their own

    @overload
    def session_scope(self, function: F, /) -> F: ...

    @overload
    def session_scope(
        self,
        /,
        *,
        mode: Mode | None = ...,
        read_only: bool = ...,
        isolation_level: str | None = ...,
        retry: Retry | None = ...,
        timeout: float | None = ...,
    ) -> SessionScopeBlock[S]: ...

    def session_scope(
        self,
        function: Any = None,
        /,
        *,
        mode: Mode | None = None,
        read_only: bool = False,
        isolation_level: str | None = None,
        retry: Retry | None = None,
        timeout: float | None = None,
    ) -> Any:
        """A scope of its own: for a script, a job, a websocket's message, a test.

        Committed at its end, rolled back if it raises or is cancelled. A context manager, and a
        decorator for coroutine functions; a fresh scope at each entry. Inside a request it is
        independent of the request's scope, with a connection of its own.

        Args:
            mode: Instead of the database's.

            read_only: Whether the database itself refuses writes.

            isolation_level: As SQLAlchemy spells it.

            retry: Whether and how a decorated function is called again that lost to a conflict.

            timeout: Seconds that a transaction may take, from its BEGIN. ``None``: the request's,
                where it is inside of one that has a timeout, and no longer than the transaction
                that is open around it.

            function: For ``@db.session_scope`` without parentheses.
        """
        changes: dict[str, Any] = {
            "read_only": read_only,
            "isolation_level": isolation_level,
            "timeout": timeout,
        }
        if mode is not None:
            changes["mode"] = mode
        block = SessionScopeBlock(self, changes, retry)
        if read_only or isolation_level is not None:
            self.check_shape(isolation_level, read_only)
        return block if function is None else block(function)

    # ---------------------------------------------------------------- transactional blocks

    @overload
    def transactional(self, propagation: F, /) -> F: ...

    @overload
    def transactional(
        self,
        propagation: Propagation | PropagationName = ...,
        *,
        isolation_level: str | None = ...,
        read_only: bool | None = ...,
        timeout: float | None = ...,
        retry: Retry | None = ...,
        rollback_for: type[Exception] | Iterable[type[Exception]] = ...,
        no_rollback_for: type[Exception] | Iterable[type[Exception]] = ...,
        label: str | None = ...,
    ) -> TransactionalBlock[S]: ...

    def transactional(self, propagation: Any = Propagation.REQUIRED, **options: Any) -> Any:
        """A block whose work is done in one transaction, wholly or not at all.

        A context manager, whose value is the session, and a decorator; re-entrant, and safe to
        share between tasks.

        Args:
            propagation: What to do with a transaction that is there; see :class:`.Propagation`.

            isolation_level: As SQLAlchemy spells it.

            read_only: Whether the database itself refuses writes. ``None`` demands nothing.

            timeout: Seconds that the transaction may take.

            retry: Whether and how a decorated function is called again that lost to a conflict,
                where the transaction is its own; where it joins one, that is for whoever began it.

            rollback_for: Exceptions that roll back although *no_rollback_for* names a class above.

            no_rollback_for: Exceptions that don't roll back.

            label: What logs and errors call it; the function's name, if it decorates one.

            options: These.

        Raises:
            ConfigurationError: If an argument is wrong; at once, not at the first entry.
            TransactionRequiredError: On entering, for ``"MANDATORY"`` outside of a transaction.
            TransactionForbiddenError: On entering, for ``"NEVER"`` inside of one.
            TransactionMismatchError: On entering, if the transaction it joins isn't what it asks.
            RollbackOnlyError: At its end, if a block inside failed and the code went on.
            TransactionTimeoutError: If it took longer than *timeout*.
        """
        if callable(propagation) and not isinstance(propagation, str):
            return TransactionalBlock(self)(propagation)  # @db.transactional without parentheses
        return TransactionalBlock(self, propagation=cast("Any", propagation), **options)

    @property
    def on_commit(self) -> HookRegistrar:
        """Run a function after the COMMIT of the transaction that is open here.

        ``db.on_commit(send, order.id)``, or as a decorator. Outside of a transaction it runs at
        once. See :class:`.HookRegistrar` for the arguments.
        """
        return HookRegistrar(Occasion.COMMIT, self)

    @property
    def on_rollback(self) -> HookRegistrar:
        """Run a function after the rollback of the transaction that is open here."""
        return HookRegistrar(Occasion.ROLLBACK, self)

    @property
    def on_completion(self) -> HookRegistrar:
        """Run a function with the :class:`.Outcome` of the transaction that is open here."""
        return HookRegistrar(Occasion.COMPLETION, self)

    # ---------------------------------------------------------------- at the same time

    def branch(self: Database[AS]) -> _branches.Branch[AS]:
        """A session of its own, with its own transaction, for work beside the current scope.

        ``async with db.branch() as session:``. Committed at its end, rolled back if it raises.
        """
        return _branches.Branch(self)

    async def gather(self, *awaitables: Awaitable[Any], limit: int | None = None) -> list[Any]:
        """Run coroutines at the same time, each in a :meth:`branch` of its own.

        As many at once as the pool can give connections for, *limit* at most; the same when they
        gather themselves. If one fails the others are cancelled and rolled back, and its error is
        raised; what has been committed by then stays.

        Returns:
            Their results, in their order.

        Raises:
            ConfigurationError: If an argument is wrong.
            PoolTooSmallError: If the pool has no connection left at this depth.
        """
        return await _branches.gather(self, awaitables, limit)

    # ---------------------------------------------------------------- for the scope

    def check_shape(self, isolation_level: str | None, read_only: bool | None) -> None:
        """Refuse transactions that this database can't have, as far as that is known now.

        Raises:
            ConfigurationError: If one is asked for.
        """
        bind = self.session_factory.kw.get("bind")
        engine = getattr(bind, "sync_engine", bind)
        if isinstance(engine, Engine):
            _dialects.check_shape(engine, isolation_level=isolation_level, read_only=read_only)

    def hook_scope(self) -> SessionScopeBlock[Any]:
        """The scope that a hook runs in."""
        return SessionScopeBlock(self, {"mode": "transaction"})

    def limiter(self, work: ThreadWork) -> anyio.CapacityLimiter:
        """The worker threads of one kind of work, which no other kind can occupy.

        What gives a connection back never waits for a thread: there are as many as connections.
        """
        limiters = self._limiters.setdefault(asyncio.get_running_loop(), {})
        limiter = limiters.get(work)
        if limiter is None:
            places = self.second_connections.capacity if work == "end" else THREADS
            limiter = limiters[work] = anyio.CapacityLimiter(places)
        return limiter

    def watch(self, connection: Connection, scope: SessionScope[S]) -> None:
        """Report to *scope* what goes wrong on *connection*."""
        if connection.dialect not in self._watched_dialects:
            watch_engine(connection.engine)
            self._watched_dialects.add(connection.dialect)
        watch(connection, scope)

    def check_transactional(self, connection: Connection) -> None:
        """Refuse a *connection* of an engine without transactions; each engine is asked once.

        Raises:
            ConfigurationError: If it is AUTOCOMMIT by itself.
        """
        if connection.engine is not self._transactional_engine:
            try:
                _dialects.check_transactional(connection.engine)
            except ConfigurationError:
                connection.invalidate()  # a session has it by now; who swallows this would go on
                raise
            self._transactional_engine = connection.engine

    def source_of(self, options: ScopeOptions) -> Database[S] | Reads:
        """Where the connections of a scope with *options* come from."""
        return self.reads if self.reads is not None and options.uses_reads else self

    def engine_for_reads(self, engine: Engine | Connection) -> Engine:
        """The engine that read-only work takes in the place of *engine*.

        Raises:
            ConfigurationError: If *engine* isn't this database's own.
        """
        assert self.reads is not None
        if engine is not self.engine:
            msg = (
                f"{self!r} has reads beside its own engine, and this session chose another one "
                f"({told(engine)}): by binds, a get_bind() of its own, or configure(). Leave "
                "read_only out here, or make the Database without reads."
            )
            raise ConfigurationError(msg)
        return self.reads.engine

    def shaped_engine(self, engine: Engine, execution_options: dict[str, Any]) -> Engine:
        """The variant of *engine* with *execution_options*, made once."""
        key = (engine, tuple(execution_options.items()))
        shaped = self._shaped_engines.get(key)
        if shaped is None:
            _dialects.check_isolation_level(engine, execution_options.get("isolation_level"))
            timeout = self.options.checkout_timeout
            if timeout is None:
                shaped = shape_engine(engine, execution_options, ShapedEngine)
            else:
                shaped = shape_engine(engine, execution_options, BoundedEngine)
                shaped.database, shaped.timeout = self.name, timeout
            self._shaped_engines[key] = shaped
        return shaped

    async def dispose(self) -> None:
        """Close the connections of the engines that this object made from a URL.

        Those that don't answer in *cleanup_timeout* seconds are dropped: no shutdown waits for
        ever.
        """
        for engine in (self.owned_reads, self.owned_engine):
            if isinstance(engine, Engine):
                with anyio.move_on_after(self.cleanup_timeout):
                    await anyio.to_thread.run_sync(engine.dispose, abandon_on_cancel=True)
            elif engine is not None:
                await dispose_in_time(engine, self.cleanup_timeout)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        msg = f"name must be a string that is not empty; got {name!r}."
        raise ConfigurationError(msg)
