"""What a scope can be told: its options, and their decorator for endpoints."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, cast, get_args

from asgi_dbscope._current import current_scope
from asgi_dbscope._policy import CommitPolicy, Mode, Stream, commit_unless_error
from asgi_dbscope._retry import Retry, check_retry, endpoint_retries
from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ScopeOptions:
    """How a scope treats its session's transactions.

    Attributes:
        mode: ``"transaction"``, ``"autocommit"`` or ``"manual"``.

        commit_policy: Says whether a response commits.

        stream: ``"release"``, ``"hold"`` or ``"error"``.

        isolation_level: As SQLAlchemy spells it (``"SERIALIZABLE"``); ``None`` leaves the engine's.

        read_only: Whether the database itself refuses writes.

        timeout: Seconds that a transaction may take, from its BEGIN.

        checkout_timeout: Seconds that the wait for a connection may take.

        retry: Whether and how a request is replayed that lost to a conflict.

        idle_warning: Seconds after which a transaction that idles is told of.

        idle_timeout: Seconds after which it is ended.

        is_admitted: Whether a request has to ask before it takes its first connection.

        has_reads: Whether the database has an engine for what is read-only.

        is_in_block: Whether they are those of a transactional block, which is a transaction.

        uses_reads: Whether it is that engine which is used.

        reads_at_once: Whether each statement is a round trip and no more: without a transaction.

        is_transaction: Whether all that is done belongs to one transaction.

        is_autocommit: Whether each statement stands for itself.

        shapes_nothing: Whether a transaction begins just as the engine does it.

        is_timed: Whether it matters when a transaction began.

        watches_idling: Whether it matters that a transaction idles.

    Raises:
        ConfigurationError: If a value is unknown, or two of them exclude each other.
    """

    mode: Mode = "transaction"
    commit_policy: CommitPolicy = commit_unless_error
    stream: Stream = "release"
    isolation_level: str | None = None
    read_only: bool = False
    timeout: float | None = None
    checkout_timeout: float | None = None
    retry: Retry | None = None
    idle_warning: float | None = None
    idle_timeout: float | None = None
    is_admitted: bool = False
    has_reads: bool = False
    is_in_block: bool = False
    uses_reads: bool = field(init=False, compare=False, repr=False, default=False)
    reads_at_once: bool = field(init=False, compare=False, repr=False, default=False)
    is_transaction: bool = field(init=False, compare=False, repr=False, default=True)
    is_autocommit: bool = field(init=False, compare=False, repr=False, default=False)
    shapes_nothing: bool = field(init=False, compare=False, repr=False, default=True)
    is_timed: bool = field(init=False, compare=False, repr=False, default=False)
    watches_idling: bool = field(init=False, compare=False, repr=False, default=False)

    def __post_init__(self) -> None:
        for name in SECONDS:
            object.__setattr__(self, name, check_time_limit(name, getattr(self, name)))
        for name, value in self._derive().items():
            object.__setattr__(self, name, value)  # it is frozen
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("stream", self.stream, get_args(Stream))
        _check_policy(self.commit_policy)
        _check_isolation_level(self.isolation_level)
        check_retry(self.retry)
        if not isinstance(self.read_only, bool):
            msg = f"read_only must be True or False, not {self.read_only!r}."
            raise ConfigurationError(msg)
        if self.mode == "autocommit" and (self.read_only or self.isolation_level is not None):
            msg = (
                "mode='autocommit' has no transaction that read_only or isolation_level could "
                "apply to; use mode='transaction' with them, or leave them out."
            )
            raise ConfigurationError(msg)

    def _derive(self) -> dict[str, bool]:
        """What the others say together."""
        uses_reads = self.has_reads and self.read_only
        # Whoever asks for an isolation level, a server's cursor or a block asks for a transaction.
        reads_at_once = (
            uses_reads
            and self.mode == "transaction"
            and self.isolation_level is None
            and self.stream != "hold"
            and not self.is_in_block
        )
        return {
            "uses_reads": uses_reads,
            "reads_at_once": reads_at_once,
            "is_transaction": self.mode == "transaction" and not reads_at_once,
            "is_autocommit": self.mode == "autocommit" or reads_at_once,
            "shapes_nothing": (
                self.mode != "autocommit"
                and self.isolation_level is None
                and not self.read_only
                and self.checkout_timeout is None
                and not self.is_admitted
            ),
            "is_timed": any(getattr(self, name) is not None for name in SECONDS),
            "watches_idling": self.idle_warning is not None or self.idle_timeout is not None,
        }

    def changed(self, changes: dict[str, Any]) -> ScopeOptions:
        """A copy with *changes*, validated."""
        return replace(self, **changes)


SECONDS = ("timeout", "checkout_timeout", "idle_warning", "idle_timeout")
"""The options that are a number of seconds."""

SHAPES_TRANSACTION = frozenset({"mode", "isolation_level", "read_only", "timeout"})
"""The options that must be known when a transaction begins; the others matter at the head."""


Concurrency = Literal["error", "serialize"]
"""What becomes of two tasks that use one session at the same time."""

LabelTransactions = Literal["application_name", "comment"]
"""Where the database shows what a transaction serves."""


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a *value* that is none of *choices*."""
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        msg = f"{name} must be one of {known}; got {value!r}."
        raise ConfigurationError(msg)


LONGEST = 4_000_000.0
"""Seconds (46 days): what a timer of a thread can wait for on every system."""


def check_seconds(name: str, value: Any) -> float:
    """Refuse a *value* that is no number of seconds to wait for."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 < value <= LONGEST):
        msg = (
            f"{name} must be a number of seconds above 0; got {value!r}. The longest is "
            f"{LONGEST:,.0f}, 46 days."
        )
        raise ConfigurationError(msg)
    return float(value)


def check_time_limit(name: str, value: Any) -> float | None:
    """The same, where ``None`` is no limit."""
    return None if value is None else check_seconds(name, value)


def _check_policy(policy: object) -> None:
    if not callable(policy):
        msg = f"commit_policy must be callable with a ResponseHead; got {policy!r}."
        raise ConfigurationError(msg)
    if inspect.iscoroutinefunction(policy):
        msg = (
            f"commit_policy {policy!r} is a coroutine function. The decision is made without "
            "waiting: use a plain function of the ResponseHead that returns True or False."
        )
        raise ConfigurationError(msg)


def _check_isolation_level(level: object) -> None:
    if level is None:
        return
    if not isinstance(level, str):
        msg = f"isolation_level must be a string such as 'SERIALIZABLE'; got {level!r}."
        raise ConfigurationError(msg)
    if level.upper() == "AUTOCOMMIT":
        msg = "isolation_level='AUTOCOMMIT' is spelled mode='autocommit' here."
        raise ConfigurationError(msg)


class session_options:  # noqa: N801 - a decorator, spelled like a function
    """Options for the current scope, set by the endpoint that needs them.

    A decorator for endpoints, coroutine functions or not, in any framework::

        @app.get("/report")
        @session_options(read_only=True, isolation_level="REPEATABLE READ")
        async def report(session: SessionDep) -> Report: ...

    Where a dependency uses the session before the endpoint runs, set them ahead of it:
    ``dependencies=[Depends(session_options(read_only=True).apply)]``.

    Args:
        mode: ``"transaction"``, ``"autocommit"`` or ``"manual"``.

        isolation_level: As SQLAlchemy spells it.

        read_only: Whether the database itself refuses writes.

        commit_policy: Says from the response head whether the transaction commits.

        stream: ``"release"``, ``"hold"`` or ``"error"``.

        retry: Whether and how the request is replayed that lost to a conflict. Make such an object
            before requests come, as a decorator does: bodies are kept from then on.

        timeout: Seconds that a transaction may take, from its BEGIN.

        database: The database's name, where several have a scope.

    Raises:
        ConfigurationError: If a value is wrong; at once, not at the first request.
    """

    def __init__(
        self,
        *,
        mode: Mode | None = None,
        isolation_level: str | None = None,
        read_only: bool | None = None,
        commit_policy: CommitPolicy | None = None,
        stream: Stream | None = None,
        retry: Retry | None = None,
        timeout: float | None = None,
        database: str | None = None,
    ) -> None:
        given: dict[str, Any] = {
            "mode": mode,
            "isolation_level": isolation_level,
            "read_only": read_only,
            "commit_policy": commit_policy,
            "stream": stream,
            "retry": retry,
            "timeout": timeout,
        }
        self._changes = {name: value for name, value in given.items() if value is not None}
        self._database = database
        self._last: tuple[ScopeOptions | None, ScopeOptions] = None, ScopeOptions(**self._changes)
        if retry is not None:
            endpoint_retries.expect(retry)

    async def apply(self) -> None:
        """Set the options on the current scope.

        Raises:
            LateOptionsError: If they shape transactions and one has begun already.
            NoSessionScopeError: If no scope is open here.
        """
        self._apply()

    def _apply(self) -> None:
        scope = current_scope(self._database)
        before, after = self._last
        if before is not scope.options:  # mostly it is: that of the middleware, for every request
            before = scope.options
            after = before.changed(self._changes)
            self._last = before, after
        scope.change_options(after, self._changes.keys())

    def __call__(self, endpoint: Callable[P, R]) -> Callable[P, R]:
        """Decorate *endpoint*; its signature stays as it is."""
        if inspect.iscoroutinefunction(endpoint):

            @wraps(endpoint)
            async def configured_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                self._apply()
                return await endpoint(*args, **kwargs)

            return cast("Callable[P, R]", configured_async)

        @wraps(endpoint)
        def configured(*args: P.args, **kwargs: P.kwargs) -> R:
            self._apply()
            return endpoint(*args, **kwargs)

        return configured
