"""The life of a session scope as a table: no I/O, no SQLAlchemy, no asyncio.

States say what the scope's session may do next, events are facts in the past, as the database's
own events report them, whoever caused them: the scope, or the user's ``session.commit()``.
Two rules can be read off the table and are tested: from the rollback-only states no path commits,
and ``CLOSED`` is the end. The idea of keeping a protocol's life in one table is h11's.
"""

from __future__ import annotations

from enum import Enum

from asgi_dbscope.errors import IllegalTransitionError


class Fact(Enum):
    """An enum whose members are found in tables at the price of any object.

    Since Python 3.11 an enum's hash is computed by Python code from its name.
    """

    __hash__ = object.__hash__


class State(Fact):
    """What a session scope is doing."""

    IDLE = "IDLE"
    """No transaction is open; one may begin."""

    ACTIVE = "ACTIVE"
    """A transaction is open."""

    COMMITTING = "COMMITTING"
    """COMMIT is on its way, or the server is asked what became of it; the answer is not known."""

    IN_DOUBT = "IN_DOUBT"
    """The connection was lost during COMMIT; nothing is left to do in that transaction."""

    ROLLBACK_ONLY_IDLE = "ROLLBACK_ONLY_IDLE"
    """No transaction is open; one that begins may only be rolled back, to the scope's end."""

    ROLLBACK_ONLY_ACTIVE = "ROLLBACK_ONLY_ACTIVE"
    """A transaction is open, and may only be rolled back."""

    CLOSED = "CLOSED"
    """The scope has ended; its session refuses use."""


class Event(Fact):
    """What has happened."""

    BEGUN = "BEGUN"
    """The session took a connection and began a transaction on it."""

    SET_ROLLBACK_ONLY = "SET_ROLLBACK_ONLY"
    """The user's code forbade this scope to commit."""

    COMMIT_SENT = "COMMIT_SENT"
    """COMMIT is being sent."""

    COMMITTED = "COMMITTED"
    """The database confirmed COMMIT, on its own connection or asked on another."""

    ANSWER_LOST = "ANSWER_LOST"
    """The connection broke between COMMIT and its answer, and nobody can say what became."""

    ROLLED_BACK = "ROLLED_BACK"
    """The transaction is gone: by ROLLBACK, or with its connection."""

    CLOSED = "CLOSED"
    """The session was closed for good."""


class Outcome(Fact):
    """What became of the scope's last transaction."""

    NOT_BEGUN = "NOT_BEGUN"
    """No transaction was begun."""

    COMMITTED = "COMMITTED"
    """The database confirmed its COMMIT."""

    ROLLED_BACK = "ROLLED_BACK"
    """Nothing of it remains."""

    IN_DOUBT = "IN_DOUBT"
    """COMMIT was sent and never answered: the data may be there or not."""


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.IDLE: {
        Event.BEGUN: State.ACTIVE,
        Event.SET_ROLLBACK_ONLY: State.ROLLBACK_ONLY_IDLE,
        Event.CLOSED: State.CLOSED,
    },
    State.ACTIVE: {
        # A session with several binds begins on each of them, and commits each in turn.
        Event.BEGUN: State.ACTIVE,
        Event.SET_ROLLBACK_ONLY: State.ROLLBACK_ONLY_ACTIVE,
        Event.COMMIT_SENT: State.COMMITTING,
        Event.ROLLED_BACK: State.IDLE,
    },
    State.COMMITTING: {
        # A listener to the COMMIT may take a first connection of a second bind.
        Event.BEGUN: State.COMMITTING,
        Event.COMMIT_SENT: State.COMMITTING,
        Event.COMMITTED: State.IDLE,
        Event.ANSWER_LOST: State.IN_DOUBT,
        # The database refused the COMMIT, and what was left has been rolled back.
        Event.ROLLED_BACK: State.IDLE,
    },
    State.IN_DOUBT: {
        Event.BEGUN: State.ACTIVE,
        Event.SET_ROLLBACK_ONLY: State.ROLLBACK_ONLY_IDLE,
        Event.CLOSED: State.CLOSED,
    },
    State.ROLLBACK_ONLY_IDLE: {
        Event.BEGUN: State.ROLLBACK_ONLY_ACTIVE,
        Event.SET_ROLLBACK_ONLY: State.ROLLBACK_ONLY_IDLE,
        Event.CLOSED: State.CLOSED,
    },
    State.ROLLBACK_ONLY_ACTIVE: {
        Event.BEGUN: State.ROLLBACK_ONLY_ACTIVE,
        Event.SET_ROLLBACK_ONLY: State.ROLLBACK_ONLY_ACTIVE,
        Event.ROLLED_BACK: State.ROLLBACK_ONLY_IDLE,
    },
    State.CLOSED: {},
}
"""``{state: {event: next state}}``; an event that is not listed is illegal in that state."""

ROLLBACK_ONLY = frozenset({State.ROLLBACK_ONLY_IDLE, State.ROLLBACK_ONLY_ACTIVE})
"""The states from which nothing commits."""

OPEN = frozenset({State.ACTIVE, State.COMMITTING, State.ROLLBACK_ONLY_ACTIVE})
"""The states with a transaction in the database."""

OUTCOMES: dict[Event, Outcome] = {
    Event.COMMITTED: Outcome.COMMITTED,
    Event.ANSWER_LOST: Outcome.IN_DOUBT,
    Event.ROLLED_BACK: Outcome.ROLLED_BACK,
}
"""What each ending event says of the transaction; the other events end nothing."""


class Lifecycle:
    """A state, and the outcome of the last transaction.

    Attributes:
        state: Where the scope is in its life.

        outcome: What became of its last transaction.
    """

    __slots__ = ("outcome", "state")

    def __init__(self) -> None:
        self.state = State.IDLE
        self.outcome = Outcome.NOT_BEGUN

    def advance(self, event: Event) -> State:
        """Take note of *event*.

        Returns:
            The state before it.

        Raises:
            IllegalTransitionError: If the table has no such step. Nothing was changed.
        """
        before = self.state
        try:
            self.state = TRANSITIONS[before][event]
        except KeyError:
            msg = (
                f"{event.name} can't happen in state {before.name}. This is a bug of asgi_dbscope "
                "or of code that drives its session's internals; please report it."
            )
            raise IllegalTransitionError(msg) from None
        if event in OUTCOMES:
            self.outcome = OUTCOMES[event]
        return before
