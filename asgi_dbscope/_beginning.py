"""How a session's transaction begins: on which connection, and with which settings."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session, SessionTransactionOrigin
from sqlalchemy.util import await_only

from asgi_dbscope import _dialects
from asgi_dbscope._connection import report_use
from asgi_dbscope._lifecycle import OPEN
from asgi_dbscope._reads import check_held, options_on
from asgi_dbscope._watch import SLACK
from asgi_dbscope.errors import ConfigurationError, OverloadedError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from asgi_dbscope._scope import SessionScope


def shaped_bind(
    scope: SessionScope[Any], session: Session, bind: Engine | Connection
) -> Engine | Connection:
    """The variant of *bind* that begins transactions as the scope's options say."""
    shape = scope.shape
    if shape.is_admitted and scope.state not in OPEN:
        _ask_for_admission(scope)
    mode = shape.mode
    if shape.is_autocommit:
        mode = "autocommit"
        transaction = session.get_transaction()
        if transaction is not None and transaction.origin is SessionTransactionOrigin.BEGIN:
            mode = "transaction"  # the user's own `async with session.begin()`: a real one
    execution_options = _dialects.begin_options(
        bind.dialect.name,
        mode=mode,
        isolation_level=shape.isolation_level,
        read_only=shape.read_only,
    )
    if shape.uses_reads:
        bind = scope.database.engine_for_reads(bind)
        execution_options = options_on(bind, execution_options)
    if not isinstance(bind, Engine):
        if not execution_options:
            return bind
        msg = (
            f"{scope!r} asks for {execution_options}, but its session is bound to a connection "
            "that somebody else has begun a transaction on. Bind the session to an engine."
        )
        raise ConfigurationError(msg)
    if not execution_options and shape.checkout_timeout is None:
        return bind
    return scope.database.shaped_engine(bind, execution_options)


def _ask_for_admission(scope: SessionScope[Any]) -> None:
    """Let the request wait for its turn, if it has had none; a connection is taken after that."""
    request, use = scope.admitted_request, scope.use
    if request is None or use is None or use.is_free:
        return  # nobody has to ask, or somebody only wants to know the engine
    try:
        await_only(request.enter(scope))
    except OverloadedError as error:
        scope.meet(error)
        raise


def leave_autocommit(session: Session, *, nested: bool) -> None:
    """Make room for a real transaction: what autobegan is nobody's transaction."""
    transaction = session.get_transaction()
    is_real = transaction is not None and transaction.origin is SessionTransactionOrigin.BEGIN
    if nested and not is_real:
        with_ = session.use.scope.database.with_  # type: ignore[attr-defined]
        msg = (
            "begin_nested() needs a transaction to set a savepoint in, and here is none: the mode "
            "is 'autocommit', or the scope reads in one round trip. "
            f"Begin one first: `{with_} session.begin(): ...`, or a transactional block."
        )
        raise ConfigurationError(msg)
    if transaction is not None and not is_real:
        session.commit()


def shape_begun(scope: SessionScope[Any], connection: Connection) -> None:
    shape = scope.shape
    if not (shape.is_autocommit or shape.uses_reads):
        scope.database.check_transactional(connection)
    if not shape.is_autocommit:
        _dialects.shape_transaction(
            connection, isolation_level=shape.isolation_level, read_only=shape.read_only
        )
    elif shape.reads_at_once and _dialects.is_autocommit(connection):
        check_held(scope, connection)


def limit_begun(scope: SessionScope[Any], connection: Connection) -> None:
    """Tell the server how long it may take; and let our clock see what is done past the session."""
    watch = scope.watch
    if scope.deadline is not None:
        slack = 0.0 if scope.database.is_sync else SLACK  # a thread has no clock of its own here
        _dialects.limit_transaction(connection, scope.deadline - monotonic(), slack=slack)
    elif (
        watch is not None
        and watch.timeout is not None
        and not (watch.is_over or scope.shape.is_autocommit)
    ):
        _dialects.limit_transaction(connection, watch.timeout, slack=SLACK)
    if watch is not None:
        report_use(connection)
