"""Type checkers read this file, nobody runs it: blocks and hooks keep what they decorate."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, assert_type

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from asgi_dbscope import (
    Database,
    Outcome,
    Propagation,
    on_commit,
    on_completion,
    on_rollback,
    transactional,
)


class MySession(AsyncSession):
    """A session class of the user's."""


def sessions_of_both_kinds(async_engine: AsyncEngine, engine: Engine) -> None:
    """An asynchronous engine gives an `AsyncSession`, a synchronous one a `Session`."""
    assert_type(Database(async_engine).session, AsyncSession)
    assert_type(Database(engine).session, Session)
    assert_type(Database(engine, reads="postgresql+psycopg://").session, Session)
    assert_type(Database(async_sessionmaker(class_=MySession)).session, MySession)


async def block_gives_the_session(db: Database[MySession]) -> None:
    """As a context manager a block gives the session, of its class."""
    async with db.transactional() as session:
        assert_type(session, MySession)
    async with db.transactional(
        Propagation.NESTED,
        isolation_level="SERIALIZABLE",
        read_only=True,
        timeout=1.5,
        rollback_for=LookupError,
        no_rollback_for=[KeyError, ValueError],
        label="report",
    ) as session:
        assert_type(session, MySession)
    manager: AbstractAsyncContextManager[MySession] = db.transactional("REQUIRES_NEW")
    async with manager as session:
        assert_type(session, MySession)


def block_of_a_synchronous_database_gives_a_session(db: Database[Session]) -> None:
    """As a context manager a synchronous block gives the `Session`."""
    with db.transactional() as session:
        assert_type(session, Session)
    manager: AbstractContextManager[Session] = db.transactional(propagation="NESTED")
    with manager as session:
        assert_type(session, Session)

    @db.transactional()
    def service(account: int, *, note: str = "") -> str:
        return f"{account} {note}"

    assert_type(service(1, note="x"), str)
    service("1")  # type: ignore[arg-type]


def decorated_coroutine_function_keeps_its_signature(db: Database[AsyncSession]) -> None:
    """Parameters, result and kind are those of what is decorated, with options or without."""

    @db.transactional()
    async def with_options(account: int, *, note: str = "") -> str:
        return f"{account} {note}"

    @db.transactional
    async def plain(account: int) -> bool:
        return bool(account)

    assert_type(asyncio.run(with_options(1, note="x")), str)
    assert_type(asyncio.run(plain(1)), bool)
    asyncio.run(with_options("1"))  # type: ignore[arg-type]
    asyncio.run(with_options(1, nte="x"))  # type: ignore[call-arg]
    asyncio.run(plain())  # type: ignore[call-arg]
    assert_type(asyncio.run(with_options(2)), str)
    takes_it(plain)


def takes_it(function: Callable[[int], Awaitable[bool]]) -> None:
    """Take a coroutine function as a framework does."""


class Service:
    """Methods of each kind are decorated."""

    db: Database[AsyncSession]

    @transactional()
    async def method(self, row: int) -> int:
        """Write."""
        return row

    async def use(self) -> None:
        """Call it."""
        assert_type(await self.method(1), int)
        await self.method("1")  # type: ignore[arg-type]


def wrong_options_are_told(db: Database[AsyncSession]) -> None:
    """Options that there are not, and values of the wrong type."""
    db.transactional(isolation="SERIALIZABLE")  # type: ignore[call-overload]
    db.transactional(timeout="5")  # type: ignore[call-overload]
    db.transactional(no_rollback_for=5)  # type: ignore[call-overload]


async def hooks_keep_the_function(db: Database[AsyncSession]) -> None:
    """A hook as a decorator is the function it was."""

    @db.on_commit
    def plain() -> int:
        return 1

    @db.on_rollback(when="after_response", on_error="raise")
    async def with_options() -> str:
        return ""

    @db.on_completion
    async def told(outcome: Outcome) -> None:
        """Hear of it."""

    assert_type(plain(), int)
    assert_type(await with_options(), str)
    assert_type(await told(Outcome.COMMITTED), None)
    db.on_commit(print, "a", "b", when="before_response", sep=" ")
    db.on_commit(plain, when="later")  # type: ignore[call-overload]


async def hooks_of_the_module_keep_the_function() -> None:
    """The same, for the one-database case."""

    @on_commit
    def first(row: int = 1) -> int:
        return row

    @on_rollback
    async def second() -> str:
        return ""

    @on_completion(on_error="raise")
    def third(outcome: Outcome) -> bool:
        return bool(outcome)

    assert_type(first(2), int)
    assert_type(await second(), str)
    assert_type(third(Outcome.COMMITTED), bool)


async def branches_give_sessions(db: Database[MySession]) -> None:
    """A branch gives a session of the database's class; `gather()` gives a list."""
    async with db.branch() as session:
        assert_type(session, MySession)

    async def find(row: int) -> int:
        return row

    results: list[Any] = await db.gather(find(1), find(2), limit=2)
    assert_type(results, list[Any])
    await db.gather(1)  # type: ignore[arg-type]
