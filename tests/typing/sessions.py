"""Type checkers read this file, nobody runs it: what kind of session a database hands out."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, assert_type

from fastapi import Depends, FastAPI
from sqlalchemy import URL, select
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from asgi_dbscope import (
    Database,
    Outcome,
    SessionScope,
    State,
    current_scope,
    current_session,
)


class MySession(AsyncSession):
    """A session class of the user's."""

    async def audit(self) -> int:
        """What only this class has."""
        return await self.scalar(select(1)) or 0


_db = Database(async_sessionmaker(class_=MySession))
SessionDep = Annotated[MySession, Depends(_db.get_session)]


def engines_and_urls_give_async_sessions(engine: AsyncEngine, url: URL) -> None:
    """An engine or a URL gives SQLAlchemy's own session."""
    assert_type(Database(engine), Database[AsyncSession])
    assert_type(Database(url), Database[AsyncSession])
    assert_type(Database("sqlite+aiosqlite://", name="x"), Database[AsyncSession])
    assert_type(Database(engine, mode="manual", cleanup_timeout=1).session, AsyncSession)
    assert_type(Database(engine, reads=engine).session, AsyncSession)


def session_class_of_the_users_is_kept(engine: AsyncEngine) -> None:
    """A session factory's class is the class of every session."""
    db = Database(async_sessionmaker(engine, class_=MySession))

    assert_type(db, Database[MySession])
    assert_type(db.session, MySession)
    assert_type(db.scope, SessionScope[MySession])
    assert_type(db.scope.session, MySession)
    assert_type(db.session_proxy, async_scoped_session[MySession])
    assert_type(db.session_proxy(), MySession)
    assert_type(db.scope.state, State)
    assert_type(db.scope.outcome, Outcome)


def session_class_of_sqlmodel_is_kept(engine: AsyncEngine) -> None:
    """SQLModel's session, with its `exec()`, is one of them."""
    db = Database(async_sessionmaker(engine, class_=SQLModelSession))

    assert_type(db.session, SQLModelSession)


def plain_session_factory(engine: AsyncEngine) -> None:
    """A session factory without a class of its own gives SQLAlchemy's."""
    assert_type(Database(async_sessionmaker(engine)).session, AsyncSession)


def wrong_sources_are_told() -> None:
    """Nothing at all is no source of sessions."""
    Database()  # type: ignore[call-overload]
    Database(create_async_engine("sqlite+aiosqlite://"), mode="atomic")  # type: ignore[call-overload]
    Database(create_async_engine("sqlite+aiosqlite://"), "name")  # type: ignore[call-overload]


async def get_session_is_awaited_or_entered(db: Database[MySession]) -> None:
    """`get_session()` gives the same session by both protocols."""
    assert_type(await db.get_session(), MySession)
    async with db.get_session() as session:
        assert_type(session, MySession)
    awaitable: Awaitable[MySession] = db.get_session()
    manager: AbstractAsyncContextManager[MySession] = db.get_session()
    dependency: Callable[[], Awaitable[MySession]] = db.get_session
    assert_type(await awaitable, MySession)
    async with manager as session:
        assert_type(session, MySession)
    assert_type(await dependency(), MySession)


def get_session_is_a_dependency(app: FastAPI) -> None:
    """`Depends(db.get_session)` in an annotation is the session."""

    async def endpoint(session: SessionDep) -> int:
        assert_type(session, MySession)
        return await session.audit()

    app.get("/")(endpoint)


async def session_scope_yields_the_session(db: Database[MySession]) -> None:
    """`async with db.session_scope()` yields a session, with options or without."""
    async with db.session_scope() as session:
        assert_type(session, MySession)
    async with db.session_scope(
        mode="manual", read_only=True, isolation_level="SERIALIZABLE"
    ) as session:
        assert_type(session, MySession)
    manager: AbstractAsyncContextManager[MySession] = db.session_scope()
    async with manager as session:
        assert_type(session, MySession)


def session_scope_keeps_the_signature(db: Database[MySession]) -> None:
    """As a decorator it keeps the parameters and the result, and what it decorates a coroutine."""

    @db.session_scope()
    async def job(account: int, *, note: str = "") -> str:
        return f"{account} {note}"

    assert_type(asyncio.run(job(1, note="x")), str)
    asyncio.run(job("1"))  # type: ignore[arg-type]
    asyncio.run(job(1, nte="x"))  # type: ignore[call-arg]


class Consumer:
    """Methods are decorated too."""

    db: Database[MySession]

    async def consume(self, messages: AsyncIterator[int]) -> None:
        """A job for each message."""
        handle = self.db.session_scope()(self.handle)
        async for message in messages:
            assert_type(await handle(message), bool)

    async def handle(self, message: int) -> bool:
        """One message."""
        return bool(message)


async def verbs_of_the_current_scope(db: Database[MySession]) -> None:
    """The verbs give nothing back."""
    assert_type(db.set_rollback_only(), None)
    assert_type(await db.release(), None)
    assert_type(await db.dispose(), None)


def current_ones() -> None:
    """The functions of the module know SQLAlchemy's session only."""
    assert_type(current_session(), AsyncSession)
    assert_type(current_session("reports"), AsyncSession)
    assert_type(current_scope().state, State)
    assert_type(current_scope("reports").outcome, Outcome)
    assert_type(current_scope().is_rollback_only, bool)
