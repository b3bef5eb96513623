"""A dependency that yields, then commits, as FastAPI's tutorial has it; both of its scopes."""

from collections.abc import Generator
from functools import partial
from typing import Annotated, Literal

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from bench.apps import Application, Setup, framework, operations, sync_operations
from bench.contestant import Contestant
from bench.handlers import given, sync_given
from bench.ways import yielding

Scope = Literal["request", "function"]


def make(scope: Scope, setup: Setup) -> Application:
    from fastapi import Depends

    fastapi = framework("fastapi")
    engine = setup.async_engine()
    get_session = yielding(async_sessionmaker(engine, expire_on_commit=False))
    session_type = Annotated[AsyncSession, Depends(get_session, scope=scope)]
    return Application(fastapi.app(given(session_type, operations(fastapi))), engine)


def make_sync(scope: Scope, setup: Setup) -> Application:
    from fastapi import Depends

    fastapi = framework("fastapi")
    engine = setup.sync_engine()
    session_factory = sessionmaker(engine, expire_on_commit=False)

    def get_session() -> Generator[Session]:
        with session_factory() as session:
            try:
                yield session
                session.commit()
            except Exception:
                session.rollback()
                raise

    session_type = Annotated[Session, Depends(get_session, scope=scope)]
    return Application(fastapi.app(sync_given(session_type, sync_operations(fastapi))), engine)


CONTESTANTS = [
    Contestant(
        "depends",
        "fastapi",
        f'`Depends`, `scope="{scope}"`',
        partial(make_sync if is_sync else make, scope),
        variant=scope,
        is_sync=is_sync,
    )
    for is_sync in (False, True)
    for scope in ("request", "function")
]
