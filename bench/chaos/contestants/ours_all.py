"""`DBSessionMiddleware` with all that it has for bad days.

It asks PostgreSQL what became of a COMMIT that got no answer, repeats what lost to a conflict, and
waits for nothing without end, whatever the driver does.
"""

from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import Retry
from bench.chaos.app import Contestant
from bench.chaos.contestants import ours


def make(engine: AsyncEngine) -> Contestant:
    """The app."""
    return ours.make(
        engine,
        {"resolve_in_doubt": True, "checkout_timeout": 1.5},
        {"retry": Retry(), "timeout": 3.0},
    )
