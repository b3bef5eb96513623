"""Random programs of transactional blocks, compared with a model that is obviously right.

`DBSCOPE_TEST_PROGRAMS=20000` asks for more of them, and for new ones at each run.
"""

import asyncio
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import Database, _current
from tests.block_model import Model
from tests.block_programs import Program, programs
from tests.block_runner import SPAN, Blocks, Run
from tests.fix_asgi import Drive
from tests.fix_database import Item

EXAMPLES = os.environ.get("DBSCOPE_TEST_PROGRAMS")
"""How many programs to run, where somebody asked for it."""

FEW = settings(
    max_examples=int(EXAMPLES or 80),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


Loop = asyncio.AbstractEventLoop


@dataclass
class Laboratory:
    """A real database to run programs on, each beside its model."""

    blocks: Blocks
    observer: sa.Engine
    loop: Loop
    drive: Drive
    programs: int = 0

    def compare(self, program: Program) -> None:
        """Run *program*, and assert that all which came of it is as the model says."""
        first = self.programs * SPAN
        self.programs += 1
        model = Model(
            is_sync=self.blocks.db.is_sync,
            has_single_writer=self.observer.dialect.name == "sqlite",
        )
        model.run(program)
        run = Run(self.blocks, first, left_out=model.left_out)
        self.loop.run_until_complete(run.run(program, self.drive))

        assert model.log == run.log
        assert model.status == run.status
        assert sorted(model.committed) == self.rows(first)
        assert 0 == self.checked_out()
        assert _current.innermost.get() is None

    def rows(self, first: int) -> list[int]:
        """What the program committed, by a connection of its own."""
        mine = sa.select(Item.id).where(Item.id.between(first, first + SPAN - 1))
        with self.observer.connect() as connection:
            return sorted(each - first for each in connection.scalars(mine))

    def checked_out(self) -> int:
        """How many connections are in use."""
        engine = self.blocks.db.session_factory.kw["bind"]
        pool = engine.pool
        assert isinstance(pool, (sa.QueuePool, sa.AsyncAdaptedQueuePool))
        return pool.checkedout()


@pytest.fixture
def laboratory(source: AsyncEngine | sa.Engine, loop: Loop, drive: Drive) -> Iterator[Laboratory]:
    """A database to run programs on."""
    is_sqlite = source.dialect.name == "sqlite"
    observer = sa.create_engine(
        source.url.set(drivername="sqlite" if is_sqlite else "postgresql+psycopg"),
        poolclass=sa.StaticPool,
        isolation_level="AUTOCOMMIT",
    )
    yield Laboratory(Blocks(Database(source)), observer, loop, drive)
    with observer.connect() as connection:
        connection.execute(sa.delete(Item))
    observer.dispose()


@pytest.mark.once
def test_programs_do_what_the_model_says(laboratory):
    """G1, G3, G4, G8, G12, G19: Jobs and requests, with blocks in any tree: rows, hooks, errors and
    responses are as the model says.
    """
    FEW(given(program=programs())(laboratory.compare))()

    logging.getLogger(__name__).info("%d programs without a difference", laboratory.programs)
