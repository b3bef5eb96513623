"""Trying again after a conflict: the option, the delays, and what one attempt knows of itself."""

from __future__ import annotations

import logging
import random
from dataclasses import KW_ONLY, dataclass
from math import ceil, inf
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import ClassVar

logger = logging.getLogger("asgi_dbscope")

COMMITTED = "a transaction was committed"
AUTOCOMMITTED = "statements in mode 'autocommit' are durable"
IN_DOUBT = "a COMMIT is in doubt"
HOOK_RAN = "a hook ran"
SENT = "a part of the response was sent"
BODY_TOO_LARGE = "the body is larger than max_body"
CLIENT_LEFT = "the client has left"
"""Fences: why no other attempt may follow, as the log says it."""

OUT_OF_TIME = "the transaction around it has to be over by then"


@dataclass(frozen=True, slots=True)
class Retry:
    """How often work that lost to a conflict is done again, and when no more.

    For ``retry=`` of the middleware, of :class:`.session_options`, of :func:`.transactional` and
    of ``db.session_scope()``. A conflict is what the database reports when it has undone one of
    several transactions that got in each other's way: a serialization failure, a deadlock.

    Attributes:
        attempts: How many there are at most, the first one included. 1 switches it off.

        base: Seconds. Before the second attempt a random time between 0 and *base* passes, before
            each later one up to twice as long as before.

        cap: Seconds that such a delay has at most.

        max_elapsed: Seconds after the beginning in which another attempt may begin.

        max_body: Bytes of a request's body that are kept for another attempt. With a longer one
            there is no other attempt.

        also: Exceptions of yours that mean a conflict, too, such as SQLAlchemy's
            ``StaleDataError``.

    Raises:
        ConfigurationError: If a value is wrong.
    """

    attempts: int = 3
    _: KW_ONLY
    base: float = 0.05
    cap: float = 1.0
    max_elapsed: float = 10.0
    max_body: int = 65536
    also: type[Exception] | Iterable[type[Exception]] = ()

    def __post_init__(self) -> None:
        _check_count("attempts", self.attempts, 1)
        _check_count("max_body", self.max_body, 0)
        for name in ("base", "cap", "max_elapsed"):
            _check_seconds(name, getattr(self, name))
        object.__setattr__(self, "also", _check_classes(self.also))  # it is frozen

    def delay_after(self, number: int) -> float:
        """Seconds between attempt *number*, which lost, and the next one.

        "Full jitter": of the ways to spread the losers of one conflict this one needs the fewest
        attempts (Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
        """
        longest = min(self.cap, self.base * 2.0 ** min(number - 1, 64))
        return random.uniform(0, longest)  # noqa: S311 - no secret

    @property
    def classes(self) -> tuple[type[Exception], ...]:
        """The classes of *also*."""
        return cast("tuple[type[Exception], ...]", self.also)

    @property
    def retry_after(self) -> int:
        """The whole seconds that a client is asked to wait after the last attempt has lost."""
        return max(1, ceil(self.cap))


def check_retry(retry: object) -> None:
    """Refuse what is no :class:`Retry`.

    Raises:
        ConfigurationError: If it is something else.
    """
    if retry is not None and not isinstance(retry, Retry):
        msg = f"retry takes a Retry, such as retry=Retry(attempts=3); got {retry!r}."
        raise ConfigurationError(msg)


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        msg = f"Retry({name}=...) takes a whole number from {least} on; got {value!r}."
        raise ConfigurationError(msg)


def _check_seconds(name: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 <= value < inf):  # type: ignore[operator]
        msg = f"Retry({name}=...) takes a number of seconds, not below 0; got {value!r}."
        raise ConfigurationError(msg)


def _check_classes(also: Any) -> tuple[type[Exception], ...]:
    classes: tuple[Any, ...]
    try:
        classes = (also,) if isinstance(also, type) else tuple(also)
    except TypeError:
        classes = (also,)
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, Exception)):
            msg = f"Retry(also=...) takes classes of Exception; got {each!r}."
            raise ConfigurationError(msg)
    return classes


class _Series:
    """What all attempts at the same work share.

    Attributes:
        begun_at: When the first one began, by :func:`time.monotonic`.

        body_size: How many bytes of a request's body have come.

        fence: Why no other one may follow, as soon as there is a reason.

        is_over: Whether the work is done, or given up.
    """

    __slots__ = ("begun_at", "body_size", "fence", "is_over")

    def __init__(self) -> None:
        self.begun_at = monotonic()
        self.body_size = 0
        self.fence: str | None = None
        self.is_over = False


class Attempt:
    """One attempt at a request, or at a call of a decorated function.

    Attributes:
        number: The first one is 1.

        retry: Whether and how another one follows; ``None`` where nobody asked for that.

        outer: The attempt that this one is a part of.
    """

    were_made: ClassVar[bool] = False
    """Whether this process has made any: where it hasn't, nothing has to be looked for."""

    __slots__ = ("_is_out_of_time", "_series", "number", "outer", "retry")

    def __init__(self, retry: Retry | None, outer: Attempt | None = None) -> None:
        Attempt.were_made = True
        self.number = 1
        self.retry = retry
        self.outer = outer
        self._is_out_of_time = False
        self._series = _Series()

    @property
    def fence(self) -> str | None:
        """Why no other one may follow, as soon as there is a reason.

        It is that of all of them: what is left of one that has lost (a task) forbids it, too.
        """
        if self._series.fence is None and self._is_body_too_large:
            return BODY_TOO_LARGE
        return self._series.fence

    @property
    def is_last(self) -> bool:
        """Whether no other attempt at this can follow."""
        retry = self.retry
        if retry is None or self.fence is not None or self.number >= retry.attempts:
            return True
        return monotonic() > self._series.begun_at + retry.max_elapsed

    def note_body(self, size: int) -> None:
        """So many bytes of a request's body have come so far."""
        self._series.body_size = size

    @property
    def _is_body_too_large(self) -> bool:
        """Whether the body is longer than the retry allows, which an endpoint may still change."""
        return self.retry is not None and self._series.body_size > self.retry.max_body

    @property
    def is_last_of_all(self) -> bool:
        """Whether no other attempt can follow, neither at this nor at what it is a part of."""
        return self.is_last and (self.outer is None or self.outer.is_last_of_all)

    @property
    def why_last(self) -> str:
        """Why no other attempt follows, for the log."""
        if self.fence is not None:
            return self.fence
        if self.retry is None or self.number >= self.retry.attempts:
            return "no attempt is left"
        return OUT_OF_TIME if self._is_out_of_time else "max_elapsed is over"

    def forbid(self, reason: str) -> None:
        """Let no other attempt follow, neither at this nor at what it is a part of."""
        self.end(reason)
        if self.outer is not None:
            self.outer.forbid(reason)

    def end(self, reason: str) -> None:
        """Let no other attempt at this follow; what it is a part of has nothing to do with it."""
        self._series.fence = self._series.fence or reason

    def delay(self, due_at: float = inf) -> float | None:
        """Seconds until the next attempt; ``None`` where there is none.

        Args:
            due_at: When what is around has to be over, by :func:`time.monotonic`.
        """
        retry = self.retry
        if retry is None or self.is_last:
            return None
        delay = retry.delay_after(self.number)
        begins_at = monotonic() + delay
        self._is_out_of_time = begins_at > due_at
        is_late = begins_at > self._series.begun_at + retry.max_elapsed
        return None if self._is_out_of_time or is_late else delay

    def finish(self) -> None:
        """The work is done, or given up: nothing is a part of it any more."""
        self._series.is_over = True

    @property
    def alive(self) -> Attempt | None:
        """This one, or the next one around it whose work is not over yet."""
        if not self._series.is_over:
            return self
        return None if self.outer is None else self.outer.alive

    def following(self) -> Attempt:
        """The next one."""
        following = Attempt(self.retry, self.outer)
        following.number = self.number + 1
        following._series = self._series
        return following


def log_loss(label: str, attempt: Attempt, code: str, delay: float | None) -> None:
    """Tell the log that *attempt* at what is called *label* has lost, and what follows."""
    assert attempt.retry is not None
    of = (label, attempt.number, attempt.retry.attempts, code)
    if delay is None:
        logger.warning(
            "%s: attempt %d of %d has lost to a conflict (%s), and was the last one: %s",
            *of,
            attempt.why_last,
        )
    else:
        logger.info(
            "%s: attempt %d of %d has lost to a conflict (%s); the next one in %.3f s", *of, delay
        )


def log_fence(label: str, attempt: Attempt) -> None:
    """Tell the log that a fence came between *attempt*, which has lost, and the next one."""
    logger.warning(
        "%s: attempt %d has lost, and was the last one after all: %s",
        *(label, attempt.number, attempt.fence),
    )


class EndpointRetries:
    """What the process knows of the ``retry=`` of its endpoints, before one of them is called.

    Which endpoint a request is for is known only when its body may have been read. So as soon as
    one endpoint has a retry (a decorator has it when its module is imported), every request's body
    is kept, as far as the largest *max_body* goes.

    Attributes:
        max_body: That largest one; ``None`` as long as no endpoint has a retry.
    """

    __slots__ = ("max_body",)

    def __init__(self) -> None:
        self.max_body: int | None = None

    def expect(self, retry: Retry) -> None:
        """An endpoint has *retry*."""
        if retry.attempts > 1:
            self.max_body = max(self.max_body or 0, retry.max_body)


endpoint_retries = EndpointRetries()
"""The one of this process."""
