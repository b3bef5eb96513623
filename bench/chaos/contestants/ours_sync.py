"""`DBSessionMiddleware` with synchronous sessions, and `def` endpoints in worker threads."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy as sa
from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI

from bench.chaos.app import Contestant
from bench.chaos.contestants import ours

IS_SYNC = True
"""The engine is, and so are the endpoints."""

THREADS = 250
"""More than there are clients."""


def make(engine: sa.Engine) -> Contestant:
    """The app."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # With the usual forty, clients wait for those who wait for the pool, at each page anew.
        current_default_thread_limiter().total_tokens = THREADS
        yield
        engine.dispose()

    return ours.make(engine, lifespan=lifespan)
