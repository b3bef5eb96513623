"""The middleware, and the response gate: one request's way through them, top to bottom.

ASGI in, decide (``_policy``), one driver (``_scope``), ASGI out.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import warnings
from enum import Enum
from typing import TYPE_CHECKING, Any

from asgi_dbscope import _current
from asgi_dbscope._asgi import ResponseHead
from asgi_dbscope._completion import redeliver
from asgi_dbscope._database import Database
from asgi_dbscope._policy import Cause, Ending, commit_unless_error
from asgi_dbscope._scope import SessionScope
from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from asgi_dbscope._asgi import ASGIApp, Message, Receive, Scope, Send
    from asgi_dbscope._options import ScopeOptions
    from asgi_dbscope._policy import CommitPolicy, Mode, Stream

    CommitErrorResponse = Callable[[Scope, BaseException], ASGIApp | None]
    Exclude = str | Iterable[str] | Callable[[Scope], bool]

logger = logging.getLogger("asgi_dbscope")

KEY = "asgi_dbscope"
"""The key in the ASGI scope under which the request's innermost session scope stands."""


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

        exclude: Paths that get no session: exact ones, prefixes (they end in ``*``), or a callable
            that is given the ASGI scope.

    Raises:
        ConfigurationError: If an option is wrong, or not just one source of sessions is named.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        engine: AsyncEngine | None = None,
        database: Database[Any] | None = None,
        databases: Sequence[Database[Any]] = (),
        mode: Mode | None = None,
        commit_policy: CommitPolicy = commit_unless_error,
        commit_error_response: CommitErrorResponse | None = None,
        stream: Stream = "release",
        exclude: Exclude | None = None,
    ) -> None:
        if not callable(app):
            msg = f"The first argument is the ASGI app; {app!r} is not callable."
            raise ConfigurationError(msg)
        if commit_error_response is not None and not callable(commit_error_response):
            msg = f"commit_error_response must be callable; got {commit_error_response!r}."
            raise ConfigurationError(msg)
        self.app = app
        self.databases = _check_databases(engine, database, databases)
        self.commit_error_response = commit_error_response
        self._options = [
            each.options.changed(
                {
                    "mode": each.options.mode if mode is None else mode,
                    "commit_policy": commit_policy,
                    "stream": stream,
                }
            )
            for each in self.databases
        ]
        self._is_excluded = _check_exclude(exclude)
        self._hides_exceptions = _find_exception_hider(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> Any:
        """Serve one ASGI scope; what the app returns is returned."""
        kind = scope.get("type")
        if kind == "http" or kind == "websocket":
            if self._is_excluded is not None and self._is_excluded(scope):
                return await self.app(scope, receive, send)
            return await self._serve(kind, scope, receive, send)
        if kind == "lifespan":
            return await self._serve_lifespan(scope, receive, send)
        return await self.app(scope, receive, send)

    async def _serve(self, kind: str, scope: Scope, receive: Receive, send: Send) -> Any:
        enclosing: SessionScope[Any] | None = scope.get(KEY)
        outer = _current.innermost.get()
        session_scopes: list[SessionScope[Any]] = []
        for database, options in zip(self.databases, self._options, strict=True):
            if enclosing is None or not _serves(enclosing, database):
                outer = SessionScope(database, outer, options, scope)
                session_scopes.append(outer)
        if not session_scopes:  # a second instance for the same databases
            return await self.app(scope, receive, send)
        scope[KEY] = outer
        token = _current.innermost.set(outer)
        try:
            if kind == "websocket":
                return await self._serve_websocket(session_scopes, scope, receive, send)
            gate = ResponseGate(self, session_scopes, scope, receive, send)
            return await gate.run(self.app)
        finally:
            _current.innermost.reset(token)
            if enclosing is None:
                del scope[KEY]
            else:
                scope[KEY] = enclosing

    async def _serve_websocket(
        self, scopes: list[SessionScope[Any]], scope: Scope, receive: Receive, send: Send
    ) -> Any:
        try:
            return await self.app(scope, receive, send)
        finally:
            for session_scope in scopes:
                session_scope.close_settled()  # it never had a session

    async def _serve_lifespan(self, scope: Scope, receive: Receive, send: Send) -> Any:
        owners = [each for each in self.databases if each.owned_engine is not None]
        if not owners:
            return await self.app(scope, receive, send)

        async def dispose_then_send(message: Message) -> None:
            # Before the server hears of it: after, it may stop the loop at once.
            if message.get("type") in _SHUTDOWN:
                for database in owners:
                    await database.dispose()
            await send(message)

        return await self.app(scope, receive, dispose_then_send)

    def hides_exceptions(self) -> bool:
        """Whether a ``BaseHTTPMiddleware`` inside hides which responses were raised."""
        if self._hides_exceptions is None:
            # An app wrapped whole may have got middleware after it was wrapped.
            self._hides_exceptions = bool(_find_exception_hider(self.app))
        return self._hides_exceptions


class Phase(Enum):
    """Which transaction of the request would end next."""

    RESPONSE = "RESPONSE"
    BODY = "BODY"
    BACKGROUND = "BACKGROUND"


class ResponseGate:
    """One request on its way: holds the head back until the transaction is settled."""

    __slots__ = (
        "_answered_failure",
        "_asgi_scope",
        "_failure",
        "_has_trailers",
        "_lock",
        "_middleware",
        "_outer_exception",
        "_phase",
        "_raw_receive",
        "_raw_send",
        "_scopes",
    )

    def __init__(
        self,
        middleware: DBSessionMiddleware,
        scopes: list[SessionScope[Any]],
        asgi_scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self._middleware = middleware
        self._scopes = scopes
        self._asgi_scope = asgi_scope
        self._raw_receive = receive
        self._raw_send = send
        self._phase = Phase.RESPONSE
        self._has_trailers = False
        self._lock: asyncio.Lock | None = None
        self._failure: BaseException | None = None
        self._answered_failure = False
        self._outer_exception = sys.exception()

    # ---------------------------------------------------------------- the request's way

    async def run(self, app: ASGIApp) -> Any:
        """Run the app to its end, and end what it left open."""
        result = error = None
        try:
            result = await app(self._asgi_scope, self.receive, self.send)
        except BaseException as raised:  # noqa: BLE001 - raised again below
            error = raised
        if self._failure is None and error is None:
            await self._finish()
            return result
        failure, self._failure = self._failure, None
        if failure is None or self._answered_failure or isinstance(error, asyncio.CancelledError):
            await self._close(Ending.ROLLBACK)
            if error is None:
                return result
            raise error
        # The head that failed never went out, and the app has been unwound: answer in its place.
        responder = None
        if self._phase is Phase.RESPONSE and app is self._middleware.app:
            await self._settle_all(Ending.ROLLBACK)
            responder = self._find_responder(failure)
        if responder is None:
            await self._close(Ending.ROLLBACK)
            raise failure
        logger.error("%s: %s", self._scopes[0].label, failure, exc_info=failure)
        return await self.run(responder)

    def receive(self) -> Awaitable[Message]:
        """The app's ``receive``."""
        if self._phase is not Phase.BODY:
            return self._raw_receive()
        return self._receive_in_body()

    def send(self, message: Message) -> Awaitable[None]:
        """The app's ``send``: passes a message on, after settling what it puts an end to."""
        if self._failure is None and (self._lock is None or not self._lock.locked()):
            for scope in self._scopes:
                if not scope.is_settled():
                    break
            else:
                self._note(message)
                return self._raw_send(message)
        return self._settle_and_send(message, sys.exception())

    async def _receive_in_body(self) -> Message:
        message = await self._raw_receive()
        if self._phase is Phase.BODY and message.get("type") == "http.disconnect":
            # Nobody reads the body any more. What it began is rolled back at the session's next
            # use, or at the end; work after the body (background tasks) starts afresh.
            self._phase = Phase.BACKGROUND
            for scope in self._scopes:
                scope.is_torn = not scope.is_settled()
        return message

    async def _settle_and_send(self, message: Message, exception: BaseException | None) -> None:
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:  # a message from another task of the app waits for its turn
            if self._failure is not None and not self._answers_failure(message):
                raise self._failure
            try:
                if self._phase is Phase.RESPONSE and _type_of(message) == "http.response.start":
                    await self._settle_head(message, exception)
                elif self._phase is Phase.BODY and self._is_last(message):
                    await self._settle(Cause.COMPLETED)
            except Exception as error:
                self._failure = error
                self._answered_failure = False
                raise
            self._note(message)
            await self._raw_send(message)

    # ---------------------------------------------------------------- settling

    async def _settle_head(self, message: Message, exception: BaseException | None) -> None:
        head = self._read_head(message, exception)
        for position, scope in enumerate(self._scopes):
            if scope.is_settled():
                continue
            try:
                ending = scope.decide(Cause.HEAD, head)
            except Exception:
                await self._settle_all(Ending.ROLLBACK)
                raise
            if ending is Ending.COMMIT and scope.options.stream == "hold":
                continue
            try:
                cancellation = await scope.settle(ending)
            except BaseException:
                for other in self._scopes[position + 1 :]:
                    await other.settle(Ending.ROLLBACK)
                raise
            if cancellation is not None:
                # The answer stands: let it go out if it can without another wait.
                redeliver(cancellation)

    async def _settle(self, cause: Cause) -> None:
        for scope in self._scopes:
            if not scope.is_settled():
                cancellation = await scope.settle(scope.decide(cause))
                if cancellation is not None:
                    redeliver(cancellation)

    async def _settle_all(self, ending: Ending) -> None:
        for scope in self._scopes:
            cancellation = await scope.settle(ending)
            if cancellation is not None:
                redeliver(cancellation)

    async def _finish(self) -> None:
        """The app has returned."""
        cause = {
            Phase.RESPONSE: Cause.NO_HEAD,
            Phase.BODY: Cause.TORN,
            Phase.BACKGROUND: Cause.COMPLETED,
        }[self._phase]
        for scope in self._scopes:
            if scope.is_settled():
                scope.close_settled()
                continue
            try:
                cancellation = await scope.close(scope.decide(cause))
            except Exception:
                # Raised here, after the response, it would make the server close a connection on
                # which the client's next request may be under way already.
                logger.exception("%s: work after the response was not committed", scope.label)
            else:
                if cancellation is not None:
                    redeliver(cancellation)

    async def _close(self, ending: Ending) -> None:
        for scope in self._scopes:
            if scope.is_settled():
                scope.close_settled()
                continue
            cancellation = await scope.close(ending)
            if cancellation is not None:
                redeliver(cancellation)

    # ---------------------------------------------------------------- reading messages

    def _note(self, message: Message) -> None:
        """Follow the response's phases."""
        if self._phase is Phase.RESPONSE:
            if _type_of(message) == "http.response.start":
                self._phase = Phase.BODY
                self._has_trailers = bool(message.get("trailers", False))
                for scope in self._scopes:
                    scope.is_stream_refused = scope.options.stream == "error"
        elif self._phase is Phase.BODY and self._is_last(message):
            self._phase = Phase.BACKGROUND
            for scope in self._scopes:
                scope.is_stream_refused = False

    def _is_last(self, message: Message) -> bool:
        kind = _type_of(message)
        if kind == "http.response.trailers":
            return not message.get("more_trailers", False)
        if self._has_trailers:
            return False
        if kind == "http.response.body" or kind == "http.response.zerocopysend":
            return not message.get("more_body", False)
        return kind == "http.response.pathsend"

    def _read_head(
        self, message: Message, exception: BaseException | None
    ) -> ResponseHead | None:
        status = message.get("status")
        if not isinstance(status, int):
            return None  # the server will object to it
        if exception is self._outer_exception:
            exception = None
        is_raised = exception is not None or (
            400 <= status < 500 and self._middleware.hides_exceptions()  # noqa: PLR2004 - a 4xx
        )
        headers = tuple((bytes(name), bytes(value)) for name, value in message.get("headers", ()))
        return ResponseHead(status, headers, exception, is_raised)

    # ---------------------------------------------------------------- failures before the head

    def _answers_failure(self, message: Message) -> bool:
        """Whether the app renders the failure by itself: a new head, with an error status."""
        if self._phase is not Phase.RESPONSE:
            return False
        if _type_of(message) == "http.response.start":
            status = message.get("status")
            self._answered_failure = isinstance(status, int) and status >= 400  # noqa: PLR2004
            if self._answered_failure:
                self._failure = None
        return self._answered_failure

    def _find_responder(self, failure: BaseException) -> ASGIApp | None:
        render = self._middleware.commit_error_response
        if render is not None:
            responder = render(self._asgi_scope, failure)
            if responder is not None:
                return responder
        if "starlette.exception_handlers" in self._asgi_scope:
            from asgi_dbscope.integrations.starlette import find_responder

            return find_responder(self._asgi_scope, failure)
        return None


_SHUTDOWN = frozenset({"lifespan.shutdown.complete", "lifespan.shutdown.failed"})


def _type_of(message: Message) -> object:
    # Whatever the app sends goes on to the server, which knows best how to object.
    return message.get("type") if isinstance(message, dict) else None


def _serves(scope: SessionScope[Any] | None, database: Database[Any]) -> bool:
    while scope is not None:
        if scope.database is database:
            return True
        scope = scope.outer
    return False


def _check_databases(
    engine: AsyncEngine | None, database: Database[Any] | None, databases: Sequence[Database[Any]]
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
        return (Database(engine),)
    found = tuple(databases) if database is None else (database,)
    for each in found:
        if not isinstance(each, Database):
            msg = f"{named[0]}= takes asgi_dbscope.Database objects; got {each!r}."
            raise ConfigurationError(msg)
    if not found:
        msg = "databases= is empty; name at least one Database."
        raise ConfigurationError(msg)
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        msg = f"The databases of one middleware need different names; got {names}."
        raise ConfigurationError(msg)
    return found


def _check_exclude(exclude: Exclude | None) -> Callable[[Scope], bool] | None:
    if exclude is None:
        return None
    if callable(exclude):
        return exclude
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
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
        path: str = scope.get("path", "")
        return path in paths or path.startswith(prefixes)

    return is_excluded


def _find_exception_hider(app: object) -> bool | None:
    """Look for a ``BaseHTTPMiddleware`` inside; ``None`` where the app may still get one."""
    may_grow = False
    while app is not None:
        planned = [getattr(each, "cls", None) for each in getattr(app, "user_middleware", ())]
        for cls in (type(app), *planned):
            if _is_base_http_middleware(cls):
                warnings.warn(_HIDER_WARNING.format(cls.__name__), stacklevel=4)
                return True
        may_grow = may_grow or hasattr(app, "user_middleware")
        app = getattr(app, "app", None)
    return None if may_grow else False


_HIDER_WARNING = (
    "{} is a BaseHTTPMiddleware inside DBSessionMiddleware: it hides whether a 4xx response was "
    "returned or raised, so every 4xx is taken for raised and rolled back. Write it as pure ASGI "
    "middleware, or add DBSessionMiddleware after it (inside)."
)


def _is_base_http_middleware(cls: object) -> bool:
    # By name, so that Starlette need not be installed.
    return any(
        each.__name__ == "BaseHTTPMiddleware" and each.__module__ == "starlette.middleware.base"
        for each in getattr(cls, "__mro__", ())
    )
