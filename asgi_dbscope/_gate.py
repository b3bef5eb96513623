"""The response gate: one request's way, from the app's first message to its return.

ASGI in, decide (``_policy``), one driver (``_scope``), ASGI out.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import current_task, get_running_loop
from dataclasses import dataclass, field
from sys import exception as handled_exception
from threading import RLock
from typing import TYPE_CHECKING, Any

from asgi_dbscope._answers import Answer, describe, find_answer, says_nothing
from asgi_dbscope._asgi import ResponseHead
from asgi_dbscope._checkout import pool_note
from asgi_dbscope._completion import redeliver
from asgi_dbscope._hook_runs import run_hooks
from asgi_dbscope._inside import find_base_http_middleware
from asgi_dbscope._lifecycle import OPEN, Fact
from asgi_dbscope._messages import (
    check_body,
    ends_body,
    ends_trailers,
    promises_trailers,
    read_head,
    refuse_second_head,
    type_of,
)
from asgi_dbscope._policy import Cause, Ending
from asgi_dbscope._scope import SessionScope
from asgi_dbscope._text import label_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from asgi_dbscope._admission import Admission, AdmittedRequest
    from asgi_dbscope._asgi import AnyASGIApp, ASGIApp, Message, Receive, Scope, Send
    from asgi_dbscope._current import ScopeHolder
    from asgi_dbscope._database import Database
    from asgi_dbscope._options import ScopeOptions
    from asgi_dbscope._retry import Attempt, Retry

    CommitErrorResponse = Callable[[Any, BaseException], AnyASGIApp | None]

logger = logging.getLogger("asgi_dbscope")


_creation = RLock()
"""Held while a request makes a scope: two worker threads may ask for it at the same time."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a middleware does for its requests.

    Attributes:
        options: The databases, in the order of their commits, and how to treat each.

        commit_error_response: See :class:`.DBSessionMiddleware`.

        warn_of_hider: Told the class of a ``BaseHTTPMiddleware`` that a response came through.

        retry: See :class:`.DBSessionMiddleware`.

        admission: Where requests wait for their turn, if they have to.

        admitted: The one request that this is for, where requests have to wait.

        admits_or_replays: Whether a request may have to wait, or be served again.

        read_only: The same databases, and how to treat requests that are read-only by their method.

        read_only_methods: Those methods.

        is_inner: Whether the requests are inside of another instance already.
    """

    options: dict[Database[Any], ScopeOptions]
    commit_error_response: CommitErrorResponse | None
    warn_of_hider: Callable[[type], None]
    retry: Retry | None = None
    admission: Admission | None = None
    admitted: AdmittedRequest | None = None
    read_only: dict[Database[Any], ScopeOptions] | None = None
    read_only_methods: frozenset[str] = frozenset()
    is_inner: bool = False
    admits_or_replays: bool = field(init=False)

    def __post_init__(self) -> None:
        admits_or_replays = self.admission is not None or self.retry is not None
        object.__setattr__(self, "admits_or_replays", admits_or_replays)  # it is frozen


class Phase(Fact):
    """Which transaction of the request would end next."""

    RESPONSE = "RESPONSE"
    BODY = "BODY"
    BACKGROUND = "BACKGROUND"


_RESPONSE = Phase.RESPONSE
_BODY = Phase.BODY
_BACKGROUND = Phase.BACKGROUND

_CAUSES = {
    Phase.RESPONSE: Cause.NO_HEAD,
    Phase.BODY: Cause.TORN,
    Phase.BACKGROUND: Cause.COMPLETED,
}
"""Why a transaction ends that is open when the app returns."""


class ResponseGate:
    """One request on its way: holds the head back until the transaction is settled.

    It is also what the context variable holds during the request, and makes a database's session
    scope when that is first asked for.

    Attributes:
        served: What the middleware does for its requests.

        outer: What is around this request: the one that called this app in process, if any did.

        scopes: The session scopes that were asked for, in the order of their commits.

        loop: The event loop of the request; ``None`` outside of asyncio.

        task: The request's own task, until its end; ``None`` outside of asyncio.

        is_over: Whether the request has ended.

        late_scopes: The scopes in it with hooks that wait for the end of the response.

        late_streamer: The task that streamed the body when its client left, and may still do so,
            where that isn't the request's own: nobody can tell what follows in that one.
    """

    is_request = True
    """It is no scope by itself."""

    __slots__ = (
        "_asgi_scope",
        "_failure",
        "_has_trailers",
        "_held",
        "_is_body_sent",
        "_is_head_taken",
        "_lock",
        "_outer_exception",
        "_phase",
        "_raw_receive",
        "_raw_send",
        "_streamer",
        "is_over",
        "late_scopes",
        "late_streamer",
        "loop",
        "outer",
        "scopes",
        "served",
        "task",
    )

    def __init__(
        self,
        served: Served,
        outer: ScopeHolder | None,
        asgi_scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self.served = served
        self.outer = outer
        self._asgi_scope = asgi_scope
        self._raw_receive = receive
        self._raw_send = send
        self._outer_exception = handled_exception()
        self._phase = _RESPONSE
        self._has_trailers = False
        self._is_head_taken = False
        self._failure: BaseException | None = None
        self._held: Message | None = None
        self._lock: asyncio.Lock | None = None
        self._streamer: asyncio.Task[Any] | None = None
        self.scopes: Sequence[SessionScope[Any]] = ()
        self.is_over = False
        self.late_scopes: Sequence[SessionScope[Any]] = ()
        self.late_streamer: asyncio.Task[Any] | None = None
        self.loop: asyncio.AbstractEventLoop | None
        self.task: asyncio.Task[Any] | None
        try:
            self.loop = loop = get_running_loop()
            self.task = current_task(loop)
        except RuntimeError:  # an app under Trio does well as long as it uses no session
            self.loop = self.task = None

    @property
    def is_in_body(self) -> bool:
        """Whether the head has been sent, and the last body message not."""
        return self._phase is Phase.BODY

    @property
    def current_attempt(self) -> Attempt | None:
        """What is known of the attempts: those of the request that called this app in process."""
        return None if self.outer is None else self.outer.current_attempt

    def have_retry(self, retry: Retry | None) -> None:
        """Serve this very request again as *retry* says: it is for the outermost instance."""
        holder = self.outer
        while holder is not None and not holder.is_request:  # a block around the inner instance
            holder = holder.outer
        if self.served.is_inner and isinstance(holder, ResponseGate):
            holder.have_retry(retry)

    @property
    def admitted_request(self) -> AdmittedRequest | None:
        """This request, where requests have to ask for a place."""
        return self.served.admitted

    @property
    def databases(self) -> Collection[Database[Any]]:
        """The databases that have a session scope in this request."""
        return self.served.options

    def find(self, database: Database[Any]) -> SessionScope[Any] | None:
        """The session scope of *database*, made at the first call; ``None`` if it has none."""
        for scope in self.scopes:  # exchanged as a whole: no lock to read it
            if scope.database is database:
                return scope
        options = self.served.options.get(database)
        return None if options is None else self._open(database, options)

    def _open(self, database: Database[Any], options: ScopeOptions) -> SessionScope[Any]:
        with _creation:
            for scope in self.scopes:  # another thread was faster
                if scope.database is database:
                    return scope
            read_only = self.served.read_only
            if read_only and self._asgi_scope.get("method") in self.served.read_only_methods:
                options = read_only[database]
            scope = SessionScope(database, self.outer, options, self._asgi_scope, self)
            if self.is_over:
                scope.close_settled()
            elif not self.scopes:
                self.scopes = (scope,)
            else:
                order = list(self.served.options).index
                self.scopes = sorted([*self.scopes, scope], key=lambda each: order(each.database))
        return scope

    def take_late_hooks(self, scope: SessionScope[Any]) -> bool:
        """Run the hooks of *scope* that wait for the response, when the app has returned."""
        if not self.scopes:  # nobody sees to its end, or it is over
            return False
        self.late_scopes = [*self.late_scopes, scope]
        return True

    # ---------------------------------------------------------------- the request's way

    def close_settled(self) -> bool:
        """The app has returned: close what needs no waiting; whether that was all."""
        if self._failure is not None or self.late_scopes:
            return False
        for scope in self.scopes:
            if scope.agenda is not None or scope.database.is_sync or not scope.is_settled():
                return False
        self.is_over = True  # a scope that a child task asks for now would never be closed
        for scope in self.scopes:
            scope.close_settled()
        self.scopes = ()  # they know the gate: no cycle is left to the garbage collector
        return True

    async def finish(self, result: Any, error: BaseException | None) -> Any:
        """The app has returned *result*, or raised *error*: end what it left open."""
        if self._failure is None and self._phase is Phase.RESPONSE and find_answer(error):
            self._failure = error
        try:
            if self._failure is not None and (error is None or isinstance(error, Exception)):
                result = await self._answer_failure(self._failure)
            elif error is not None:
                raise error
        except BaseException as raised:
            cancellation = await self._close(Cause.RAISED)
            if cancellation is not None and not isinstance(raised, asyncio.CancelledError):
                redeliver(cancellation)  # the error under way first
            raise
        finally:
            del error  # its traceback holds this frame: no cycle
        cancellation = await self._close(_CAUSES[self._phase])
        if cancellation is not None:
            raise cancellation
        return result

    async def _answer_failure(self, failure: BaseException) -> Any:
        """Answer in the place of an app whose response did not get committed.

        Its head never went out, and the app has been unwound.

        Raises:
            BaseException: *failure*, where nobody renders it: the server's 500. Also after a head:
                a body whose transaction failed ends torn.
        """
        self._outer_exception = handled_exception()
        responder = None
        if self._phase is Phase.RESPONSE:
            await self._settle_all(Cause.RAISED)
            responder = self._find_responder(failure)
        if responder is None:
            raise failure from failure.__cause__
        label = label_of(self._asgi_scope)
        if isinstance(responder, Answer):
            told = describe(failure)
            told += f" ({note})" if (note := pool_note(failure)) else ""
            logger.warning("%s: answered %d: %s", label, responder.status, told)
        else:
            kind = type(failure).__name__  # what the database says has line breaks and values in it
            logger.error("%s: not committed (%s)", label, kind, exc_info=failure)
        self._failure = None
        result = await responder(self._asgi_scope, self.receive, self.send)
        if self._failure is not None:
            raise self._failure
        return result

    async def receive(self) -> Message:
        """The app's ``receive``: passes a message on; a client that left ends the body's work."""
        message = await self._raw_receive()
        if self._phase is Phase.BODY and type_of(message) == "http.disconnect":
            async with self._settling():
                # Nobody reads the body any more: what it began is rolled back. Work after the
                # body (background tasks) starts afresh. Unless its last message was on its way.
                if self._phase is Phase.BODY:
                    self._phase = Phase.BACKGROUND
                    streamer = self._streamer
                    if streamer is not None and streamer not in {self.task, current_task()}:
                        self.late_streamer = streamer  # it isn't told
                    for scope in self.scopes:
                        await scope.abandon_body()
        return message

    def send(self, message: Message) -> Awaitable[None]:
        """The app's ``send``: passes a message on, after settling what it puts an end to."""
        if self.scopes and not self._is_settled():
            return self._settle_and_send(message, handled_exception())
        # The two messages of most responses, in line.
        try:
            kind = message["type"]
            if kind == "http.response.body" and self._phase is _BODY and not self._has_trailers:
                if not message.get("more_body"):
                    self._phase = _BACKGROUND
                elif self.loop is not None:
                    self._streamer = current_task()
            elif (
                kind == "http.response.start"
                and self._phase is _RESPONSE
                and "trailers" not in message
            ):
                self._phase = _BODY
                if self.scopes:
                    self._streamer = current_task()
            else:
                self._note(type_of(message), message)
        except Exception:  # noqa: BLE001, S110 - whatever it is, the server knows best how to object
            pass
        return self._raw_send(message)

    def _is_settled(self) -> bool:
        """Whether a message may pass at once: nothing to settle, nor being settled, nor failed."""
        if self._failure is not None or (self._lock is not None and self._lock.locked()):
            return False
        for scope in self.scopes:
            if scope.met is not None or not scope.is_settled():
                return False
        return handled_exception() is self._outer_exception  # else it may have an answer of its own

    async def _settle_and_send(self, message: Message, exception: BaseException | None) -> None:
        async with self._settling():
            failure = self._failure
            if failure is not None:
                if self._held is not None:
                    await self._release_head(message, failure)
                elif not self._answers_failure(message):
                    raise failure
            kind = type_of(message)
            try:
                if self._phase is Phase.RESPONSE and kind == "http.response.start":
                    await self._settle_head(message, exception)
                    if message.get("status") == 500:  # noqa: PLR2004 - maybe a framework's own
                        self._failure = self._hidden_error(exception, failure)
                        if self._failure is not None:  # its body tells if it is
                            self._held = message
                            return
                elif self._phase is Phase.BODY:
                    await self._settle_body(kind, message)
            except Exception as error:
                self._failure = error
                self._forget_head()
                raise
            before = self._phase
            self._note(kind, message)
        # Not in its turn any more: a client that reads slowly holds up nobody but itself.
        await self._pass_on(kind, message, before)

    async def _pass_on(self, kind: str | None, message: Message, before: Phase) -> None:
        """Send *message*; if the server refuses it, the response is where it was *before*."""
        after = self._phase
        try:
            await self._raw_send(message)
        except Exception:  # refused; a cancellation says nothing of what has gone out
            if self._phase is after:
                self._phase = before
                if before is _BODY and after is _BODY and ends_body(kind, message):
                    self._is_body_sent = False
            raise
        if before is _RESPONSE and after is _BODY:
            self._is_head_taken = True

    # ---------------------------------------------------------------- settling

    def _settling(self) -> asyncio.Lock:
        """Held while a transaction is settled: other tasks' messages wait for their turn."""
        if self._lock is None:
            self._lock = asyncio.Lock()
        return self._lock

    async def _settle_head(self, message: Message, exception: BaseException | None) -> None:
        try:
            for scope in self.scopes:
                if scope.boundaries and find_base_http_middleware() is None:
                    scope.check_blocks()
            unsettled = [scope for scope in self.scopes if not scope.is_settled()]
            if not unsettled:
                return
            head = self._read_head(message, exception)
            # Every decision before the first COMMIT, and rollbacks before commits.
            endings = [(scope, scope.decide(Cause.HEAD, head)) for scope in unsettled]
            if len(endings) > 1:
                endings.sort(key=lambda each: each[1] is Ending.COMMIT)
            for scope, ending in endings:
                if ending is Ending.ROLLBACK or scope.options.stream != "hold":
                    # The answer stands: let it go out if it can without another wait.
                    redeliver(await scope.settle(ending))
        except BaseException:
            await self._settle_all(Cause.RAISED)
            raise

    async def _settle_body(self, kind: str | None, message: Message) -> None:
        is_last = self._is_last(kind, message)
        if not all(scope.is_settled() for scope in self.scopes):
            try:
                if kind == "http.response.start" and not self._is_head_taken:
                    refuse_second_head(self._asgi_scope)
                check_body(kind, message, self._asgi_scope, is_last=is_last)
            except BaseException:
                await self._settle_all(Cause.RAISED)
                raise
        if is_last:
            await self._settle_all(Cause.COMPLETED)

    async def _settle_all(self, cause: Cause) -> None:
        for scope in self.scopes:
            await self._settle(scope, cause)

    async def _settle(self, scope: SessionScope[Any], cause: Cause) -> None:
        if not scope.is_settled():
            ending = scope.decide(cause)
            redeliver(await scope.settle(ending, is_failing=cause is Cause.RAISED))

    async def _close(self, cause: Cause) -> asyncio.CancelledError | None:
        """Close every scope, and return a cancellation that arrived meanwhile."""
        with _creation:  # a thread may be making a scope
            self.is_over = True  # what is asked for now would never be closed
        cancellation: asyncio.CancelledError | None = None
        for scope in self.scopes:
            if scope.is_over:
                continue  # an error of another one has brought us here
            if scope.shut() and scope.agenda is None:
                scope.close_settled()
                continue
            try:
                ending = self._decide_last(scope, cause)
                is_failing = cause is Cause.RAISED
                cancellation = await scope.close(ending, is_failing=is_failing) or cancellation
            except asyncio.CancelledError as error:
                cancellation = error
            except Exception:
                # Raised here, after the response, it would make the server close a connection on
                # which the client's next request may be under way already.
                logger.exception("%s: work after the response was not committed", scope.label)
        self.scopes = ()  # they know the gate: no cycle is left to the garbage collector
        for scope in self.late_scopes:
            cancellation = await run_hooks(scope, late=True, is_failing=True) or cancellation
        return cancellation

    def _decide_last(self, scope: SessionScope[Any], cause: Cause) -> Ending:
        try:
            return scope.decide(cause)
        except Exception:
            logger.exception("%s: work after the response is rolled back", scope.label)
            return Ending.ROLLBACK

    # ---------------------------------------------------------------- reading messages

    def _note(self, kind: str | None, message: Message) -> None:
        """Follow the response's phases."""
        if self.scopes:
            self._streamer = current_task()
        if self._phase is Phase.RESPONSE:
            if kind == "http.response.start":
                self._phase = Phase.BODY
                self._has_trailers = promises_trailers(message, self._asgi_scope)
                self._is_body_sent = False
        elif self._phase is Phase.BODY:
            if self._is_last(kind, message):
                self._phase = Phase.BACKGROUND
            elif ends_body(kind, message):
                self._is_body_sent = True

    def _is_last(self, kind: str | None, message: Message) -> bool:
        if self._has_trailers:
            return self._is_body_sent and ends_trailers(kind, message)
        return ends_body(kind, message)

    def _read_head(self, message: Message, exception: BaseException | None) -> ResponseHead:
        status, headers = read_head(message, self._asgi_scope)
        if exception is self._outer_exception:
            exception = None
        is_raised = exception is not None
        if 400 <= status < 500 and not is_raised:  # noqa: PLR2004 - a 4xx
            hider = find_base_http_middleware()
            if hider is not None:
                is_raised = True
                self.served.warn_of_hider(hider)
        return ResponseHead(status, headers, exception, is_raised)

    # ---------------------------------------------------------------- failures before the head

    def _hidden_error(
        self, exception: BaseException | None, failure: BaseException | None
    ) -> BaseException | None:
        """The error with an answer of its own that a 500 stands for, if it stands for one."""
        if exception is not None and exception is not self._outer_exception:
            candidates = [exception]
        else:
            candidates = [each for each in (failure, *map(_met_by, self.scopes)) if each]
        return next((each for each in candidates if find_answer(each) is not None), None)

    async def _release_head(self, message: Message, failure: BaseException) -> None:
        """Send the 500 that was held back, if *message* after it says more than that it is one.

        Raises:
            BaseException: *failure*, which has a better answer.
        """
        held, self._held = self._held, None
        if held is None or says_nothing(message, self._asgi_scope):
            self._forget_head()
            raise failure
        self._failure = None
        self._note("http.response.start", held)
        await self._pass_on("http.response.start", held, _RESPONSE)

    def _forget_head(self) -> None:
        if self._phase is Phase.RESPONSE and "litestar_app" in self._asgi_scope:
            from asgi_dbscope.integrations.litestar import forget_head

            forget_head(self._asgi_scope)

    def _answers_failure(self, message: Message) -> bool:
        """Whether the app renders the failure by itself: a new head, with an error status."""
        if self._phase is not Phase.RESPONSE:
            return False
        if type_of(message) == "http.response.start":
            status = message.get("status")
            if isinstance(status, int) and status >= 400:  # noqa: PLR2004 - an error's
                self._failure = None
                return True
        return False

    def _find_responder(self, failure: BaseException) -> ASGIApp | None:
        render = self.served.commit_error_response
        if render is not None:
            try:
                responder = render(self._asgi_scope, failure)
            except Exception as error:
                raise error from failure
            if responder is not None:
                return responder
        if "starlette.exception_handlers" in self._asgi_scope:
            from asgi_dbscope.integrations.starlette import find_responder, has_last_word

            responder = find_responder(self._asgi_scope, failure)
            if responder is not None or has_last_word(self._asgi_scope):
                return responder
        return find_answer(failure)


def _met_by(scope: SessionScope[Any]) -> BaseException | None:
    """The error that *scope* has met last, if nothing was begun after it."""
    if scope.met is None or scope.expiry is not None:
        return scope.expiry
    error, outcome = scope.met
    return error if scope.state not in OPEN and scope.outcome is outcome else None
