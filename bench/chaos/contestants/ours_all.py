"""`DBSessionMiddleware` with all that it has for bad days.

It asks PostgreSQL what became of a COMMIT that got no answer, and repeats what lost to a conflict.
"""

from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import Retry
from bench.chaos.app import Contestant
from bench.chaos.contestants import ours


def make(engine: AsyncEngine) -> Contestant:
    """The app."""
    return ours.make(engine, {"resolve_in_doubt": True}, {"retry": Retry()})
