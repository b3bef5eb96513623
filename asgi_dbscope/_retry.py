"""Trying again after a conflict: the option, the delays, and what one attempt knows of itself."""

from __future__ import annotations

import random
from dataclasses import KW_ONLY, dataclass
from math import ceil, inf
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

COMMITTED = "a transaction was committed"
AUTOCOMMITTED = "statements in mode 'autocommit' are durable"
IN_DOUBT = "a COMMIT is in doubt"
HOOK_RAN = "a hook ran"
SENT = "a part of the response was sent"
BODY_TOO_LARGE = "the body is larger than max_body"
CLIENT_LEFT = "the client has left"
"""Fences: why no other attempt may follow, as the log says it."""


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


class Attempt:
    """One attempt at a request, or at a call of a decorated function.

    Attributes:
        number: The first one is 1.

        retry: Whether and how another one follows; ``None`` where nobody asked for that.

        outer: The attempt that this one is a part of.

        fence: Why no other one may follow, as soon as there is a reason.
    """

    __slots__ = ("_begun_at", "fence", "number", "outer", "retry")

    def __init__(self, retry: Retry | None, outer: Attempt | None = None) -> None:
        self.number = 1
        self.retry = retry
        self.outer = outer
        self.fence: str | None = None
        self._begun_at = monotonic()

    @property
    def is_last(self) -> bool:
        """Whether no other attempt can follow."""
        retry = self.retry
        return retry is None or self.fence is not None or self.number >= retry.attempts

    @property
    def why_last(self) -> str:
        """Why no other attempt follows, for the log."""
        if self.fence is not None:
            return self.fence
        return "no attempt is left" if self.is_last else "max_elapsed is over"

    def forbid(self, reason: str) -> None:
        """Let no other attempt follow, neither of this nor of what it is a part of."""
        self.fence = self.fence or reason
        if self.outer is not None:
            self.outer.forbid(reason)

    def delay(self) -> float | None:
        """Seconds until the next attempt; ``None`` where there is none."""
        retry = self.retry
        if retry is None or self.is_last:
            return None
        delay = retry.delay_after(self.number)
        is_late = monotonic() + delay > self._begun_at + retry.max_elapsed
        return None if is_late else delay

    def following(self) -> Attempt:
        """The next one."""
        following = Attempt(self.retry, self.outer)
        following.number = self.number + 1
        following._begun_at = self._begun_at
        return following


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
