"""`DBSessionMiddleware`, which asks PostgreSQL what became of a COMMIT that got no answer."""

from sqlalchemy.ext.asyncio import AsyncEngine

from bench.chaos.app import Contestant
from bench.chaos.contestants import ours


def make(engine: AsyncEngine) -> Contestant:
    """The app."""
    return ours.make(engine, {"resolve_in_doubt": True})
