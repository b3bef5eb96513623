"""The middleware: its options, and which ASGI scopes get a session scope.

A request's way goes on in ``_gate``.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope._admission import KEY, Admission, AdmittedRequest
from asgi_dbscope._current import get_innermost, open_around, reset_innermost, set_innermost
from asgi_dbscope._database import Database
from asgi_dbscope._gate import ResponseGate, Served
from asgi_dbscope._inside import find_hider, has_retry_inside
from asgi_dbscope._messages import type_of
from asgi_dbscope._policy import commit_unless_error
from asgi_dbscope._replay import serve, serve_once
from asgi_dbscope._retry import endpoint_retries
from asgi_dbscope._scope import SessionScope
from asgi_dbscope._text import told
from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from asgi_dbscope._asgi import AnyASGIApp, Message, Receive, Scope, Send
    from asgi_dbscope._gate import CommitErrorResponse
    from asgi_dbscope._options import ScopeOptions
    from asgi_dbscope._policy import CommitPolicy, Mode, Stream
    from asgi_dbscope._retry import Retry

    Exclude = str | Iterable[str] | Callable[[Scope], bool]


class DBSessionMiddleware:
    """Give each request one session, and commit before the response's head goes out.

    Args:
        app: The ASGI app.

        engine: An ``AsyncEngine``. Name just one of *engine*, *database*, *databases*.

        database: A :class:`.Database`.

        databases: Several of them; at the head they are committed in this order.

        mode: ``"transaction"``: one per request. ``"autocommit"``: each statement is durable by
            itself. ``"manual"``: only the user's code commits; what is open at the head or at the
            end is rolled back, with a warning. ``None``: the database's own, which is
            ``"transaction"`` if it says nothing.

        commit_policy: Says from the response head whether the transaction commits.

        commit_error_response: Called with the ASGI scope and the error where a response can't be
            sent because its transaction didn't commit. Returns an ASGI app that answers instead,
            or ``None`` to leave it to the app's own exception handler or the server's 500.

        stream: What a streaming body's use of the session means. ``"release"``: a new transaction,
            committed before the last body message. ``"hold"``: the response's own transaction
            stays open to the body's end. ``"error"``: refused.

        retry: Whether and how a request is replayed that lost to a conflict with another
            transaction; ``None``: only where its endpoint has ``session_options(retry=...)``.

        timeout: Seconds that a transaction of a request may take, from its BEGIN; then it is
            rolled back, and the response is a 504. Those of scopes inside it share that time,
            unless they name their own. ``None``: as long as it likes.

        max_concurrent: How many requests may work with the databases at the same time, from their
            first use of a session to their response's head (with ``stream="hold"``: to its body's
            end). The others wait, in their order, and hold nothing. Requests are counted, not
            connections: one that has its place takes a second one without another wait. ``None``:
            as many as come.

        max_waiting: How many may wait; one more is a 503 at once. ``None``: any number.

        waiting_timeout: Seconds that one may wait; then it is a 503.

        read_only_methods: Requests with these methods are read-only, as by
            ``session_options(read_only=True)``: ``("GET", "HEAD", "OPTIONS")``. An endpoint that
            writes all the same says ``session_options(read_only=False)``.

        exclude: Paths that get no session: exact ones, prefixes (they end in ``*``), or a callable
            that is given the ASGI scope.

    Raises:
        ConfigurationError: If an option is wrong, or not just one source of sessions is named.
    """

    def __init__(
        self,
        app: AnyASGIApp,
        *,
        engine: AsyncEngine | Engine | None = None,
        database: Database[Any] | None = None,
        databases: Sequence[Database[Any]] = (),
        mode: Mode | None = None,
        commit_policy: CommitPolicy = commit_unless_error,
        commit_error_response: CommitErrorResponse | None = None,
        stream: Stream = "release",
        retry: Retry | None = None,
        timeout: float | None = None,
        max_concurrent: int | None = None,
        max_waiting: int | None = None,
        waiting_timeout: float = 5.0,
        read_only_methods: Iterable[str] = (),
        exclude: Exclude | None = None,
    ) -> None:
        if not callable(app):
            msg = f"The first argument is the ASGI app; {told(app)} is not callable."
            raise ConfigurationError(msg)
        if commit_error_response is not None and not callable(commit_error_response):
            msg = f"commit_error_response must be callable; got {commit_error_response!r}."
            raise ConfigurationError(msg)
        self.app = app
        self.databases = _check_databases(engine, database, databases)
        self.retry = retry
        changes: dict[str, Any] = {
            "commit_policy": commit_policy,
            "stream": stream,
            "retry": retry,
            "timeout": timeout,
            "is_admitted": max_concurrent is not None,
        }
        admission = None
        if max_concurrent is not None:
            _check_asynchronous(self.databases)
            admission = Admission(max_concurrent, max_waiting, waiting_timeout)
        if mode is not None:
            changes["mode"] = mode
        options = {each: each.options.changed(changes) for each in self.databases}
        read_only, methods = _check_methods(read_only_methods, options)
        self._served = Served(
            options,
            commit_error_response,
            self._warn_of_hider,
            retry,
            admission,
            read_only=read_only,
            read_only_methods=methods,
        )
        self._is_excluded = _check_exclude(exclude)
        self._has_warned = False
        hider = find_hider(app)
        if hider is not None:
            self._warn_of_hider(hider)
        if retry is None and has_retry_inside(app, DBSessionMiddleware):
            _warn_of_retry_inside()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Serve one ASGI scope; what the app returns is returned."""
        if scope.get("type") != "http":
            return await self._serve_other(scope, receive, send)
        if self._is_excluded is not None and self._is_excluded(scope):
            return await self.app(scope, receive, send)
        served = self._served
        if KEY in scope:
            served = _unserved(served)
            if not served.options:  # a second instance for the same databases
                return await self.app(scope, receive, send)
        if served.admits_or_replays or endpoint_retries.max_body is not None:
            return await self._serve_otherwise(served, scope, receive, send)
        scope[KEY] = True
        outer = get_innermost()
        if outer is not None:
            outer = open_around(outer)
        gate = ResponseGate(served, outer, scope, receive, send)
        token = set_innermost(gate)
        try:
            result = await self.app(scope, gate.receive, gate.send)
            is_over = not gate.scopes or gate.close_settled()
            return result if is_over else await gate.finish(result, None)
        except BaseException as error:
            if gate.scopes:
                return await gate.finish(None, error)
            raise
        finally:
            gate.is_over = True
            gate.task = None
            reset_innermost(token)
            if served is self._served:  # the first instance that it came to
                scope.pop(KEY, None)

    async def _serve_otherwise(
        self, served: Served, scope: Scope, receive: Receive, send: Send
    ) -> Any:
        """Serve a request that may have to wait for its turn, or be replayed."""
        is_first = KEY not in scope
        scope[KEY] = True
        request = None
        if served.admission is not None:
            request = AdmittedRequest(served.admission, receive, send, get_innermost())
            receive, send = request.receive, request.send
            served = replace(served, admitted=request)
        try:
            # Inside of another instance: what the app did in its sessions would be done twice.
            if is_first and (served.retry is not None or endpoint_retries.max_body is not None):
                return await serve(self.app, served, scope, receive, send)
            gate = ResponseGate(served, open_around(get_innermost()), scope, receive, send)
            return await serve_once(self.app, gate, scope)
        finally:
            if request is not None:
                request.close()
            if is_first:
                scope.pop(KEY, None)

    async def _serve_other(self, scope: Scope, receive: Receive, send: Send) -> Any:
        """Serve what has no session of its own."""
        kind = scope.get("type")
        if kind == "lifespan":
            return await self._serve_lifespan(scope, receive, send)
        if kind == "websocket" and (self._is_excluded is None or not self._is_excluded(scope)):
            return await self._serve_websocket(scope, receive, send)
        return await self.app(scope, receive, send)

    async def _serve_websocket(self, scope: Scope, receive: Receive, send: Send) -> Any:
        """Serve a connection whose messages have sessions, by blocks of their own."""
        holder = open_around(get_innermost())
        session_scopes: list[SessionScope[Any]] = []
        for database, options in self._served.options.items():
            holder = SessionScope(database, holder, options, scope)
            session_scopes.append(holder)
        token = set_innermost(holder)
        try:
            return await self.app(scope, receive, send)
        finally:
            reset_innermost(token)
            for session_scope in session_scopes:
                session_scope.close_settled()

    async def _serve_lifespan(self, scope: Scope, receive: Receive, send: Send) -> Any:
        """Dispose of the engines that were made from a URL when the app ends."""
        owners = [each for each in self.databases if each.owned_engine or each.owned_reads]
        if not owners:
            return await self.app(scope, receive, send)

        async def dispose_then_send(message: Message) -> None:
            # Before the server hears of it: after, it may stop the loop at once.
            if type_of(message) in _END_OF_LIFE:
                for database in owners:
                    await database.dispose()
            await send(message)

        try:
            return await self.app(scope, receive, dispose_then_send)
        except BaseException:
            for database in owners:
                await database.dispose()
            raise

    def _warn_of_hider(self, hider: type) -> None:
        """Warn, once: when the middleware is built, or where one shows later in a part of it."""
        if self._has_warned:
            return
        self._has_warned = True
        msg = (
            f"{hider.__name__} is a BaseHTTPMiddleware inside DBSessionMiddleware: it hides "
            "whether a 4xx response was returned or raised, so every 4xx that comes through it is "
            "taken for raised and rolled back. Write it as pure ASGI middleware, or put it "
            "outside: in Starlette and FastAPI add it after DBSessionMiddleware."
        )
        warnings.warn(msg, stacklevel=3)


def _warn_of_retry_inside() -> None:
    """Warn of a retry that nobody will ask for."""
    msg = (
        "A DBSessionMiddleware with a retry is inside of one without: only the outermost one can "
        "serve a request again, for the work of its own session would be lost with the attempt. "
        "Give the retry to the outer one; or name all databases in one: databases=[first, second]."
    )
    warnings.warn(msg, stacklevel=3)


_END_OF_LIFE = frozenset(
    {"lifespan.shutdown.complete", "lifespan.shutdown.failed", "lifespan.startup.failed"}
)


def _unserved(served: Served) -> Served:
    """*served* without the databases that a scope is open for already."""
    options = dict(served.options)
    holder = open_around(get_innermost())
    while holder is not None:
        for database in holder.databases:
            options.pop(database, None)
        holder = open_around(holder.outer)
    return replace(served, options=options, is_inner=True)


def _check_databases(
    engine: AsyncEngine | Engine | None,
    database: Database[Any] | None,
    databases: Sequence[Database[Any]],
) -> tuple[Database[Any], ...]:
    named = [
        name
        for name, value in (("engine", engine), ("database", database), ("databases", databases))
        if value is not None and value != ()
    ]
    if len(named) != 1:
        given = " and ".join(named) if named else "none of them"
        msg = (
            "DBSessionMiddleware takes just one of engine=, database= and databases=; got "
            f"{given}. For example: add_middleware(DBSessionMiddleware, engine=engine)."
        )
        raise ConfigurationError(msg)
    if engine is not None:
        return (_database_of(engine),)
    if database is None and not isinstance(databases, (list, tuple)):
        msg = f"databases= takes a list or tuple of Database objects; got {told(databases)}."
        raise ConfigurationError(msg)
    found = tuple(databases) if database is None else (database,)
    for each in found:
        if not isinstance(each, Database):
            msg = f"{named[0]}= takes asgi_dbscope.Database objects; got {told(each)}."
            raise ConfigurationError(msg)
    if not found:
        msg = "databases= is empty; name at least one Database."
        raise ConfigurationError(msg)
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        msg = f"The databases of one middleware need different names; got {names}."
        raise ConfigurationError(msg)
    return found


_databases: WeakValueDictionary[int, Database[Any]] = WeakValueDictionary()


def _check_asynchronous(databases: Iterable[Database[Any]]) -> None:
    for database in databases:
        if database.is_sync:
            msg = (
                f"max_concurrent is for asynchronous databases, and {database!r} is synchronous: "
                "who waits would hold a worker thread, which those inside may need. The threads "
                "are the limit there: anyio.to_thread.current_default_thread_limiter()."
            )
            raise ConfigurationError(msg)


def _database_of(engine: AsyncEngine | Engine) -> Database[Any]:
    """The database that *engine* stands for: the same one for every middleware that names it."""
    if not isinstance(engine, (AsyncEngine, Engine)):
        return Database(engine)
    known = _databases.get(id(engine))
    if known is None:  # a database keeps its engine alive, and so the id its own
        known = _databases[id(engine)] = Database(engine)
    return known


def _check_methods(
    methods: object, options: dict[Database[Any], ScopeOptions]
) -> tuple[dict[Database[Any], ScopeOptions] | None, frozenset[str]]:
    """How requests are treated that are read-only by their method, and which methods these are."""
    if methods == ():
        return None, frozenset()
    is_list = isinstance(methods, (list, tuple, set, frozenset))
    known = frozenset(cast("Iterable[Any]", methods)) if is_list else frozenset[Any]()
    if not known or not all(isinstance(each, str) and each.isupper() for each in known):
        msg = (
            "read_only_methods takes a list of HTTP methods in capitals, such as ('GET', 'HEAD', "
            f"'OPTIONS'); got {methods!r}."
        )
        raise ConfigurationError(msg)
    for database in options:
        database.check_shape(None, read_only=True)
    read_only = {each: it.changed({"read_only": True}) for each, it in options.items()}
    return read_only, known


def _check_exclude(exclude: Exclude | None) -> Callable[[Scope], bool] | None:
    if exclude is None:
        return None
    if callable(exclude):
        return exclude
    try:
        patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    except TypeError:
        patterns = [cast("str", exclude)]
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.startswith("/"):
            msg = (
                f"exclude takes paths that start with '/', prefixes such as '/static/*', or a "
                f"callable of the ASGI scope; got {pattern!r}."
            )
            raise ConfigurationError(msg)
    paths = frozenset(pattern for pattern in patterns if not pattern.endswith("*"))
    prefixes = tuple(pattern[:-1] for pattern in patterns if pattern.endswith("*"))

    def is_excluded(scope: Scope) -> bool:
        path = scope.get("path")
        return isinstance(path, str) and (path in paths or path.startswith(prefixes))

    return is_excluded
