"""Which ending a transaction gets: pure decisions from facts, no I/O.

The table, with *cause* down the side:

==============================  ==================================================
head                            the commit policy decides; rollback-only rolls back
app returned without a head     roll back: the server will answer 500
body or background completed    commit
client left in mid-body         roll back
raised or cancelled             roll back
==============================  ==================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from asgi_dbscope._asgi import ResponseHead
from asgi_dbscope._lifecycle import ROLLBACK_ONLY, Fact, State
from asgi_dbscope._text import name_of
from asgi_dbscope.errors import CommitPolicyError

Mode = Literal["transaction", "autocommit", "manual"]
"""``"transaction"``: one per request, committed before the head. ``"autocommit"``: each statement
is durable by itself. ``"manual"``: only the user's code commits."""

Stream = Literal["release", "hold", "error"]
"""What a streaming body's use of the session means. ``"release"``: a new transaction, committed
before the last body message. ``"hold"``: the response's own transaction stays open to the body's
end. ``"error"``: it is refused."""

CommitPolicy: TypeAlias = Callable[[ResponseHead], bool]
"""Says whether a response commits."""


class Ending(Fact):
    """What we decide to do with an open transaction."""

    COMMIT = "COMMIT"
    ROLLBACK = "ROLLBACK"

    ABANDON = "ABANDON"
    """A rollback by throwing the connection away: somebody is at work on it unseen."""


class Cause(Fact):
    """Why a transaction ends now."""

    HEAD = "HEAD"
    """The app sends its response head."""

    COMPLETED = "COMPLETED"
    """The body, the background work, the job or the block came to its end."""

    RELEASED = "RELEASED"
    """The user's code called ``release()``."""

    NO_HEAD = "NO_HEAD"
    """The app returned without having answered."""

    TORN = "TORN"
    """The app returned, or the client left, before the body was complete."""

    RAISED = "RAISED"
    """The app, the job or the block raised, or was cancelled."""


def commit_unless_error(head: ResponseHead) -> bool:
    """Commit below 500 when nothing was raised. The default.

    A 404 that the endpoint *returned* commits; an ``HTTPException(404)`` that it *raised* doesn't.
    """
    return head.status < 500 and not head.raised  # noqa: PLR2004 - the HTTP class of server errors


def commit_on_success(head: ResponseHead) -> bool:
    """Commit below 400 when nothing was raised."""
    return head.status < 400 and not head.raised  # noqa: PLR2004 - the HTTP classes of errors


ENDINGS: dict[Cause, Ending] = {
    Cause.COMPLETED: Ending.COMMIT,
    Cause.RELEASED: Ending.COMMIT,
    Cause.NO_HEAD: Ending.ROLLBACK,
    Cause.TORN: Ending.ROLLBACK,
    Cause.RAISED: Ending.ROLLBACK,
}
"""The ending of every cause but ``HEAD``, where the commit policy decides."""


def decide_ending(
    cause: Cause,
    state: State,
    *,
    mode: Mode = "transaction",
    policy: CommitPolicy = commit_unless_error,
    head: ResponseHead | None = None,
) -> Ending:
    """Decide how the open transaction ends.

    Args:
        cause: Why it ends now.

        state: Where the scope is in its life. Rollback-only never commits.

        mode: ``"manual"`` commits only what the user's code releases.

        policy: Asked where *cause* is ``HEAD``.

        head: What the app wants to send. ``None`` stands for a head that can't be understood
            (its status is no number), and never commits.

    Raises:
        CommitPolicyError: If *policy* answers with something other than ``True`` or ``False``.
    """
    if state in ROLLBACK_ONLY:
        return Ending.ROLLBACK
    if mode == "manual" and cause is not Cause.RELEASED:
        return Ending.ROLLBACK
    if cause is not Cause.HEAD:
        return ENDINGS[cause]
    if head is None:
        return Ending.ROLLBACK
    answer = policy(head)
    if answer is True:
        return Ending.COMMIT
    if answer is False:
        return Ending.ROLLBACK
    msg = (
        f"The commit policy {name_of(policy)} answered with a {type(answer).__name__} for status "
        f"{head.status}; it must return True (commit) or False (roll back). The transaction was "
        "rolled back."
    )
    raise CommitPolicyError(msg)
