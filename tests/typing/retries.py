"""Type checkers read this file, nobody runs it: retries, and conflicts in tests."""

from typing import Any, assert_type

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    Retry,
    current_scope,
    session_options,
    transactional,
)
from asgi_dbscope.testing import InjectedConflicts, inject_conflicts

RETRY = Retry(5, base=0.1, cap=2, max_elapsed=30, max_body=0, also=StaleDataError)
RETRIES = [RETRY, Retry(), Retry(attempts=1), Retry(also=[LookupError, StaleDataError])]


def retries_are_checked() -> None:
    """Everything but the attempts is named, and of its type."""
    Retry(3, 0.1)  # type: ignore[call-arg]
    Retry(also="StaleDataError")  # type: ignore[arg-type]
    session_options(retry=3)  # type: ignore[arg-type]


def middleware_takes_one(app: Any, engine: AsyncEngine) -> None:
    """So does an endpoint."""
    DBSessionMiddleware(app, engine=engine, retry=RETRY)
    session_options(retry=RETRY)


async def decorated_functions_stay_what_they_are(
    db: Database[AsyncSession], sync_db: Database[Session]
) -> None:
    """Their arguments and what they return."""

    @db.transactional("REQUIRES_NEW", retry=RETRY)
    async def transfer(amount: int, *, note: str = "") -> str:
        return f"{amount} {note}"

    @db.session_scope(retry=RETRY)
    async def load(amount: int) -> str:
        return f"{amount}"

    @sync_db.transactional(retry=RETRY)
    def transfer_here(amount: int) -> str:
        return f"{amount}"

    @transactional(retry=RETRY)
    async def transfer_anywhere(amount: int) -> str:
        return f"{amount}"

    assert_type(await transfer(1, note=""), str)
    assert_type(await load(1), str)
    assert_type(transfer_here(1), str)
    assert_type(await transfer_anywhere(1), str)
    transfer_here("1")  # type: ignore[arg-type]


def attempts_are_known() -> None:
    """By the current scope."""
    assert_type(current_scope().attempt, int)
    assert_type(current_scope().is_last_attempt, bool)
    current_scope().fence("sent an e-mail")


def conflicts_are_injected(db: Database[AsyncSession], engine: Engine) -> None:
    """Into a database, or an engine of either kind."""
    with inject_conflicts(db, at="UPDATE account", times=None) as injected:
        assert_type(injected, InjectedConflicts)
        assert_type(injected.count, int)
    with inject_conflicts(engine, at=2):
        pass
