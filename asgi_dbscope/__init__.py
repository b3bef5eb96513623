"""One SQLAlchemy session per request, committed before the client hears of it."""

from asgi_dbscope._asgi import ResponseHead
from asgi_dbscope._current import current_scope, current_session
from asgi_dbscope._database import Database
from asgi_dbscope._hooks import on_commit, on_completion, on_rollback
from asgi_dbscope._lifecycle import Outcome, State
from asgi_dbscope._middleware import DBSessionMiddleware
from asgi_dbscope._options import session_options
from asgi_dbscope._policy import CommitPolicy, commit_on_success, commit_unless_error
from asgi_dbscope._poolers import pgbouncer_options
from asgi_dbscope._propagation import Propagation
from asgi_dbscope._reads import read_only_options
from asgi_dbscope._retry import Retry
from asgi_dbscope._scope import SessionScope
from asgi_dbscope._transactional import transactional
from asgi_dbscope.errors import (
    AmbiguousDatabaseError,
    CommitInDoubtError,
    CommitPolicyError,
    ConcurrentSessionUseError,
    ConfigurationError,
    DatabaseUnreachableError,
    DBScopeError,
    EventLoopMismatchError,
    IllegalTransitionError,
    LateOptionsError,
    MalformedMessageError,
    NoSessionScopeError,
    OverloadedError,
    PoolExhaustedError,
    PoolTooSmallError,
    ReadOnlyError,
    ReplayedError,
    RollbackOnlyError,
    SessionScopeClosedError,
    SessionScopeMismatchError,
    StreamSessionError,
    TransactionAbortedError,
    TransactionForbiddenError,
    TransactionIdleError,
    TransactionMismatchError,
    TransactionRequiredError,
    TransactionTimeoutError,
    WebSocketSessionError,
)

__all__ = [
    "AmbiguousDatabaseError",
    "CommitInDoubtError",
    "CommitPolicy",
    "CommitPolicyError",
    "ConcurrentSessionUseError",
    "ConfigurationError",
    "DBScopeError",
    "DBSessionMiddleware",
    "Database",
    "DatabaseUnreachableError",
    "EventLoopMismatchError",
    "IllegalTransitionError",
    "LateOptionsError",
    "MalformedMessageError",
    "NoSessionScopeError",
    "Outcome",
    "OverloadedError",
    "PoolExhaustedError",
    "PoolTooSmallError",
    "Propagation",
    "ReadOnlyError",
    "ReplayedError",
    "ResponseHead",
    "Retry",
    "RollbackOnlyError",
    "SessionScope",
    "SessionScopeClosedError",
    "SessionScopeMismatchError",
    "State",
    "StreamSessionError",
    "TransactionAbortedError",
    "TransactionForbiddenError",
    "TransactionIdleError",
    "TransactionMismatchError",
    "TransactionRequiredError",
    "TransactionTimeoutError",
    "WebSocketSessionError",
    "commit_on_success",
    "commit_unless_error",
    "current_scope",
    "current_session",
    "on_commit",
    "on_completion",
    "on_rollback",
    "pgbouncer_options",
    "read_only_options",
    "session_options",
    "transactional",
]
