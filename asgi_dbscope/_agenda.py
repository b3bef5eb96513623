"""What the end of a transaction owes: its hooks, and the failures that forbid its COMMIT.

Each entry remembers the savepoint it came under, and goes with it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from asgi_dbscope._lifecycle import Fact, Outcome
from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from sqlalchemy.orm import SessionTransaction

When = Literal["before_response", "after_response"]
"""When a hook runs: before the response's head goes out, or once the app has returned."""

OnError = Literal["log", "raise"]
"""What becomes of a hook's error."""


class Occasion(Fact):
    """What a hook waits for."""

    COMMIT = "COMMIT"
    ROLLBACK = "ROLLBACK"
    COMPLETION = "COMPLETION"


@dataclass(frozen=True, slots=True)
class Hook:
    """A callback that waits for the end of a transaction.

    Raises:
        ConfigurationError: If something about it is wrong.
    """

    occasion: Occasion
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = field(default=(), repr=False)  # values are not for a log
    keywords: dict[str, Any] = field(default_factory=dict, repr=False)
    when: When = "before_response"
    on_error: OnError = "log"

    def __post_init__(self) -> None:
        if not callable(self.function):
            msg = (
                f"A hook is a function, called at the transaction's end; got {self.function!r}. "
                "Pass the function and its arguments apart: db.on_commit(send_mail, order.id)."
            )
            if inspect.iscoroutine(self.function):
                self.function.close()
            raise ConfigurationError(msg)
        check_hook_options(self.when, self.on_error)

    @property
    def is_async(self) -> bool:
        """Whether it is known to return an awaitable."""
        call = getattr(self.function, "__call__", None)  # noqa: B004 - looked at, not called
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    def is_for(self, outcome: Outcome) -> bool:
        """Whether it runs after *outcome*."""
        if self.occasion is Occasion.COMPLETION:
            return True
        wanted = Outcome.COMMITTED if self.occasion is Occasion.COMMIT else Outcome.ROLLED_BACK
        return outcome is wanted

    def call(self, outcome: Outcome) -> Any:
        """Call it."""
        if self.occasion is Occasion.COMPLETION:
            return self.function(outcome, *self.arguments, **self.keywords)
        return self.function(*self.arguments, **self.keywords)


def check_hook_options(when: object, on_error: object) -> None:
    """Refuse values that nobody knows."""
    for name, value, choices in (
        ("when", when, get_args(When)),
        ("on_error", on_error, get_args(OnError)),
    ):
        if value not in choices:
            known = " or ".join(repr(choice) for choice in choices)
            msg = f"{name} must be {known}; got {value!r}."
            raise ConfigurationError(msg)


@dataclass(slots=True)
class _Entry:
    content: Any
    savepoint: SessionTransaction | None
    is_rolled_back: bool = False


class Agenda:
    """The hooks and the failures of a scope's open transaction, and the hooks that are due.

    Attributes:
        due: Hooks whose transaction has ended, with its outcome.

        late: Those of them that wait for the end of the response too.

        started: Hooks that were told to run at once, and still do.

        is_handed_over: Whether a request runs the late ones at its end.
    """

    __slots__ = (
        "_conflicts",
        "_failures",
        "_hooks",
        "due",
        "is_handed_over",
        "late",
        "started",
    )

    def __init__(self) -> None:
        self._conflicts: list[_Entry] = []
        self._hooks: list[_Entry] = []
        self._failures: list[_Entry] = []
        self.due: list[tuple[Hook, Outcome]] = []
        self.late: list[tuple[Hook, Outcome]] = []
        self.started: set[asyncio.Task[None]] = set()
        self.is_handed_over = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is owed before the response."""
        return not (self._hooks or self._failures or self.due or self.started)

    @property
    def failure(self) -> BaseException | None:
        """The first error of a joined block that forbids the COMMIT."""
        return self._failures[0].content if self._failures else None

    @property
    def conflict(self) -> BaseException | None:
        """The conflict with another transaction that this one has lost to."""
        return self._conflicts[0].content if self._conflicts else None

    def add_conflict(self, error: BaseException, savepoint: SessionTransaction | None) -> None:
        """The transaction has lost, unless *savepoint* is rolled back to."""
        self._conflicts.append(_Entry(error, savepoint))

    def failure_under(self, savepoint: SessionTransaction) -> BaseException | None:
        """The first such error since *savepoint*."""
        for each in self._failures:
            if _is_under(each.savepoint, savepoint):
                error: BaseException = each.content
                return error
        return None

    def add_hook(self, hook: Hook, savepoint: SessionTransaction | None) -> None:
        """Let *hook* wait for the end of the transaction, or of *savepoint*."""
        self._hooks.append(_Entry(hook, savepoint))

    def add_failure(self, error: BaseException, savepoint: SessionTransaction | None) -> None:
        """Forbid the COMMIT, unless *savepoint* is rolled back to."""
        self._failures.append(_Entry(error, savepoint))

    def roll_back_to(self, savepoint: SessionTransaction) -> None:
        """What came since *savepoint* is undone: failures are healed, on-commit hooks dropped."""
        self._failures = [e for e in self._failures if not _is_under(e.savepoint, savepoint)]
        self._conflicts = [e for e in self._conflicts if not _is_under(e.savepoint, savepoint)]
        for entry in self._hooks:
            if _is_under(entry.savepoint, savepoint):
                entry.is_rolled_back = True

    def end(self, outcome: Outcome) -> None:
        """The transaction is over."""
        self._conflicts, self._failures = [], []
        hooks, self._hooks = self._hooks, []
        for entry in hooks:
            hook: Hook = entry.content
            became = Outcome.ROLLED_BACK if entry.is_rolled_back else outcome
            if hook.is_for(became):
                (self.late if hook.when == "after_response" else self.due).append((hook, became))


def _is_under(savepoint: SessionTransaction | None, ancestor: SessionTransaction | None) -> bool:
    while savepoint is not None:
        if savepoint is ancestor:
            return True
        savepoint = savepoint.parent
    return False
