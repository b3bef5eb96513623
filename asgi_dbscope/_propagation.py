"""What a transactional block does where one is, or isn't: pure tables, no I/O.

The seven propagations and their meaning are Spring's (``TransactionDefinition``).
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from asgi_dbscope._lifecycle import Fact
from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable


PropagationName = Literal[
    "REQUIRED", "REQUIRES_NEW", "NESTED", "SUPPORTS", "NOT_SUPPORTED", "MANDATORY", "NEVER"
]
"""The names of :class:`Propagation`'s members."""


class Propagation(StrEnum):
    """What a transactional block does with the transaction around it."""

    REQUIRED = "REQUIRED"
    """Join it; begin one where there is none. The default."""

    REQUIRES_NEW = "REQUIRES_NEW"
    """Begin one of its own, on a session and a connection of its own."""

    NESTED = "NESTED"
    """Set a savepoint in it; begin one where there is none."""

    SUPPORTS = "SUPPORTS"
    """Join it; go without where there is none."""

    NOT_SUPPORTED = "NOT_SUPPORTED"
    """Go without: outside of it, on a session of its own."""

    MANDATORY = "MANDATORY"
    """Join it; refuse to run where there is none."""

    NEVER = "NEVER"
    """Go without; refuse to run where there is one."""


class Situation(Fact):
    """What a block finds where it is entered."""

    NO_SCOPE = "NO_SCOPE"
    """No session scope is open; or a websocket's, which has no session."""

    NO_TRANSACTION = "NO_TRANSACTION"
    """A scope whose statements belong to no transaction of ours: autocommit, manual."""

    IN_TRANSACTION = "IN_TRANSACTION"
    """A scope with a transaction, whether or not a statement has been sent yet."""


class Entry(Fact):
    """What a block does when it is entered."""

    JOIN = "JOIN"
    BEGIN = "BEGIN"
    SAVEPOINT = "SAVEPOINT"
    NEW_SCOPE = "NEW_SCOPE"
    AUTOCOMMIT_SCOPE = "AUTOCOMMIT_SCOPE"
    AS_IS = "AS_IS"
    REFUSE_WITHOUT = "REFUSE_WITHOUT"
    REFUSE_WITHIN = "REFUSE_WITHIN"


ENTRIES: dict[Propagation, dict[Situation, Entry]] = {
    Propagation.REQUIRED: {
        Situation.NO_SCOPE: Entry.NEW_SCOPE,
        Situation.NO_TRANSACTION: Entry.BEGIN,
        Situation.IN_TRANSACTION: Entry.JOIN,
    },
    Propagation.REQUIRES_NEW: {
        Situation.NO_SCOPE: Entry.NEW_SCOPE,
        Situation.NO_TRANSACTION: Entry.NEW_SCOPE,
        Situation.IN_TRANSACTION: Entry.NEW_SCOPE,
    },
    Propagation.NESTED: {
        Situation.NO_SCOPE: Entry.NEW_SCOPE,
        Situation.NO_TRANSACTION: Entry.BEGIN,
        Situation.IN_TRANSACTION: Entry.SAVEPOINT,
    },
    Propagation.SUPPORTS: {
        Situation.NO_SCOPE: Entry.AUTOCOMMIT_SCOPE,
        Situation.NO_TRANSACTION: Entry.AS_IS,
        Situation.IN_TRANSACTION: Entry.JOIN,
    },
    Propagation.NOT_SUPPORTED: {
        Situation.NO_SCOPE: Entry.AUTOCOMMIT_SCOPE,
        Situation.NO_TRANSACTION: Entry.AS_IS,
        Situation.IN_TRANSACTION: Entry.AUTOCOMMIT_SCOPE,
    },
    Propagation.MANDATORY: {
        Situation.NO_SCOPE: Entry.REFUSE_WITHOUT,
        Situation.NO_TRANSACTION: Entry.REFUSE_WITHOUT,
        Situation.IN_TRANSACTION: Entry.JOIN,
    },
    Propagation.NEVER: {
        Situation.NO_SCOPE: Entry.AUTOCOMMIT_SCOPE,
        Situation.NO_TRANSACTION: Entry.AS_IS,
        Situation.IN_TRANSACTION: Entry.REFUSE_WITHIN,
    },
}
"""``{propagation: {what is there: what the block does}}``."""


def check_propagation(value: object) -> Propagation:
    """*value* as a member.

    Raises:
        ConfigurationError: If it is none.
    """
    try:
        return Propagation(value)  # type: ignore[arg-type]
    except ValueError:
        known = ", ".join(repr(each.value) for each in Propagation)
        msg = f"propagation must be one of {known}; got {value!r}."
        raise ConfigurationError(msg) from None


class RollbackRules:
    """Which exceptions roll a block back: every one, but for those named in *no_rollback_for*.

    Where an exception falls under both, the class nearer to it decides, as in Spring.

    Raises:
        ConfigurationError: If something else than exception classes is named.
    """

    __slots__ = ("_commits", "_rolls_back")

    def __init__(
        self,
        rollback_for: type[Exception] | Iterable[type[Exception]] = (),
        no_rollback_for: type[Exception] | Iterable[type[Exception]] = (),
    ) -> None:
        self._rolls_back = _check_classes("rollback_for", rollback_for)
        self._commits = _check_classes("no_rollback_for", no_rollback_for)

    def rolls_back(self, error: BaseException) -> bool:
        """Whether *error*, raised out of the block, rolls it back."""
        if not self._commits:
            return True
        for cls in type(error).__mro__:
            if cls in self._rolls_back:
                return True
            if cls in self._commits:
                return False
        return True


def _check_classes(name: str, classes: object) -> frozenset[type]:
    found: tuple[object, ...]
    try:
        found = (classes,) if isinstance(classes, type) else tuple(classes)  # type: ignore[arg-type]
    except TypeError:
        found = (classes,)
    for each in found:
        if not (isinstance(each, type) and issubclass(each, Exception)):
            msg = (
                f"{name} takes classes of Exception; got {each!r}. A cancellation and the like "
                "always roll back."
            )
            raise ConfigurationError(msg)
    return frozenset(each for each in found if isinstance(each, type))
