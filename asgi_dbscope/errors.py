"""Every error that asgi_dbscope raises, one class per condition.

SQLAlchemy's and the driver's own errors surface as they are, with a note (:pep:`678`) that says
what became of the transaction. Only the loss of the connection during COMMIT is wrapped, in a
:class:`CommitInDoubtError`: what handles lost connections elsewhere, by trying again, must not
handle it.
"""

from __future__ import annotations


class DBScopeError(Exception):
    """The base of every error of this package."""


class ConfigurationError(DBScopeError, ValueError):
    """An option is wrong. Raised when the object is built, or where the option is given."""


class NoSessionScopeError(DBScopeError, LookupError):
    """A session was asked for where no session scope is open."""


class AmbiguousDatabaseError(DBScopeError, LookupError):
    """Several databases have a scope here, and the call did not name one."""


class SessionScopeClosedError(DBScopeError):
    """A session was used after its scope had ended, or after it was closed by hand."""


class SessionScopeMismatchError(DBScopeError):
    """A session of one request was used in another one."""


class WebSocketSessionError(DBScopeError):
    """A websocket's code asked for a session outside ``async with db.session_scope()``."""


class StreamSessionError(DBScopeError):
    """A streaming body used the session although the scope has ``stream="error"``."""


class LateOptionsError(DBScopeError):
    """Options that shape a transaction were given after that transaction had begun."""


class RollbackOnlyError(DBScopeError):
    """A COMMIT was asked for where nothing may be committed.

    Either the scope was set rollback-only; or a transactional block inside failed, which is this
    error's ``__cause__``, and the code caught that and went on.
    """


class ReadOnlyError(DBScopeError):
    """A write was asked for, or its refusal swallowed, in a scope that reads in one round trip."""


class TransactionRequiredError(DBScopeError):
    """A block with ``propagation="MANDATORY"`` was entered outside of any transaction."""


class TransactionForbiddenError(DBScopeError):
    """A block with ``propagation="NEVER"`` was entered inside a transaction."""


class TransactionMismatchError(DBScopeError):
    """A block demands of the transaction that it joins what that transaction hasn't."""


class TransactionTimeoutError(DBScopeError, TimeoutError):
    """A transaction took longer than its ``timeout``; it was rolled back."""


class TransactionIdleError(DBScopeError):
    """A transaction was idle for longer than ``idle_timeout``; it was rolled back."""


class PoolExhaustedError(DBScopeError, TimeoutError):
    """No connection came free within ``checkout_timeout``; a note says who holds them."""


class DatabaseUnreachableError(DBScopeError, TimeoutError):
    """The database didn't answer the attempt to connect within ``checkout_timeout``."""


class OverloadedError(DBScopeError):
    """The request waited in vain to be let in: ``max_concurrent`` others are being served."""


class PoolTooSmallError(DBScopeError):
    """A second connection was asked for while one is held, and the pool could never give it."""


class TransactionAbortedError(DBScopeError):
    """A COMMIT was asked for in a transaction that the database has already aborted.

    After an SQL error PostgreSQL answers COMMIT with ROLLBACK and raises nothing. After a deadlock
    MariaDB has rolled back already, and what follows is another transaction. The error that aborted
    the transaction is this one's ``__cause__``.
    """


class CommitInDoubtError(DBScopeError):
    """The connection was lost during COMMIT: the transaction may or may not be committed.

    The database's error is this one's ``__cause__``. Nothing is tried again by this package; what
    the user's code tries again may be done twice.

    Attributes:
        transaction_id: PostgreSQL's number of the transaction, to ask ``pg_xact_status`` of; only
            with ``Database(resolve_in_doubt=True)``, else ``None``.
    """

    def __init__(self, message: str, *, transaction_id: int | None = None) -> None:
        super().__init__(message)
        self.transaction_id = transaction_id


class ReplayedError(DBScopeError):
    """This attempt at the request lost to a conflict, and the request is served once more.

    Raised out of ``send``, to end an attempt whose response must not go out; the conflict is its
    ``__cause__``. Nobody has to handle it: it never gets out of the middleware. What runs in an app
    on any error (a ``finally``, a catch-all exception handler that alerts somebody) sees it.
    """


class ConcurrentSessionUseError(DBScopeError):
    """Two tasks or threads used one session at the same time."""


class EventLoopMismatchError(DBScopeError):
    """A session was used from another thread or event loop than the one its scope runs in."""


class MalformedMessageError(DBScopeError, TypeError):
    """The app sent a message that decides over a transaction and can't be understood.

    A response head whose status is no HTTP status, say. The transaction was rolled back, and the
    message not sent: a server that takes it all the same would tell the client of a success.
    """


class CommitPolicyError(DBScopeError, TypeError):
    """A commit policy answered with something other than ``True`` or ``False``."""


class IllegalTransitionError(DBScopeError):
    """An event arrived that the lifecycle's table doesn't allow; nothing was changed."""
