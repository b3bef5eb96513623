"""What a transactional block demands of a transaction that it finds, and the refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from asgi_dbscope._propagation import Entry
from asgi_dbscope.errors import (
    TransactionForbiddenError,
    TransactionMismatchError,
    TransactionRequiredError,
)

if TYPE_CHECKING:
    from asgi_dbscope._scope import SessionScope
    from asgi_dbscope._transactional import TransactionalBlock


def check_demands(block: TransactionalBlock[Any], scope: SessionScope[Any]) -> None:
    """Refuse to join a transaction that isn't what this block demands.

    Raises:
        TransactionMismatchError: If it isn't.
    """
    if block.timeout is not None:
        msg = (
            f"{block.label} demands timeout={block.timeout} and joins the transaction of "
            f"{scope!r}, which isn't its own to end. Use propagation='REQUIRES_NEW', "
            "or mode='autocommit' (there the outermost block is the transaction)."
        )
        raise TransactionMismatchError(msg)
    shape = scope.shape
    for name, wanted in block.changes.items():
        has = getattr(shape, name)
        is_free = not (scope.has_begun or has or name in scope.demands)
        if not is_free and _normal(has) != _normal(wanted):
            refuse_mismatch(block, scope, name)
    if not scope.has_begun:
        scope.configure(**block.changes, is_in_block=True)
        scope.shaped_by = block.label
        scope.demands |= block.changes.keys()


def refuse_mismatch(
    block: TransactionalBlock[Any], scope: SessionScope[Any], name: str
) -> NoReturn:
    """Say that the transaction of *scope* has another value of *name* than the block demands."""
    wanted = block.changes[name]
    msg = (
        f"{block.label} demands {name}={wanted!r} and joins the transaction of "
        f"{scope!r}, which has {name}={getattr(scope.shape, name)!r}. Begin it that way, "
        f"with session_options({name}={wanted!r}) on the endpoint or the same on the "
        "outer block; or use propagation='REQUIRES_NEW', or mode='autocommit', where "
        "the outermost block is the transaction."
    )
    raise TransactionMismatchError(msg)


def check_demands_nothing(block: TransactionalBlock[Any], kind: Entry) -> None:
    """Refuse demands of a transaction where there is none."""
    demands = dict(block.changes)
    if block.timeout is not None and kind is Entry.AS_IS:
        demands["timeout"] = block.timeout
    if demands:
        wanted = ", ".join(f"{name}={value!r}" for name, value in demands.items())
        msg = (
            f"{block.label} demands {wanted}, and goes without a transaction here, which that "
            "could apply to. Use propagation='REQUIRED', which begins one; or leave it out."
        )
        raise TransactionMismatchError(msg)


def refuse_entry(
    block: TransactionalBlock[Any], kind: Entry, scope: SessionScope[Any] | None
) -> NoReturn:
    """Say why the block can't be entered: there is no transaction, or there is one."""
    if kind is Entry.REFUSE_WITHOUT:
        msg = (
            f"{block.label} has propagation='MANDATORY' and there is no transaction to join"
            f"{'' if scope is None else f' in {scope!r}'}. Call it inside `db.transactional()` "
            "or `db.session_scope()`, or leave the propagation out."
        )
        raise TransactionRequiredError(msg)
    msg = (
        f"{block.label} has propagation='NEVER' and there is the transaction of {scope!r}. "
        "Call it outside of that, or use propagation='NOT_SUPPORTED' to run beside it."
    )
    raise TransactionForbiddenError(msg)


def _normal(value: object) -> object:
    return value.replace("_", " ").upper() if isinstance(value, str) else value
