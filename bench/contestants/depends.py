"""A dependency that yields, then commits, as FastAPI's tutorial has it; both of its scopes."""

from collections.abc import AsyncGenerator
from functools import partial
from typing import Annotated, Literal

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from bench.apps import Application, Setup, framework, operations
from bench.contestant import Contestant
from bench.handlers import given


def make(scope: Literal["request", "function"], setup: Setup) -> Application:
    from fastapi import Depends

    fastapi = framework("fastapi")
    engine = setup.async_engine()
    session_factory = async_sessionmaker(engine, expire_on_commit=False)

    async def get_session() -> AsyncGenerator[AsyncSession]:
        async with session_factory() as session:
            try:
                yield session
                await session.commit()
            except Exception:
                await session.rollback()
                raise

    session_type = Annotated[AsyncSession, Depends(get_session, scope=scope)]
    return Application(fastapi.app(given(session_type, operations(fastapi))), engine)


CONTESTANTS = [
    Contestant(
        "depends",
        "fastapi",
        f'`Depends`, `scope="{scope}"`',
        partial(make, scope),
        variant=scope,
    )
    for scope in ("request", "function")
]
