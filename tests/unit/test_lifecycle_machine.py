"""Random programs on a real session scope, compared with a model that is obviously right.

The model knows what was written and what was committed, and nothing of how: no states, no events.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import (
    Database,
    Outcome,
    ResponseHead,
    RollbackOnlyError,
    SessionScope,
    SessionScopeClosedError,
    State,
)
from asgi_dbscope._policy import Cause, Ending
from tests.fix_database import Base, Item

TAKEN = 0
"""The id of a row that is there from the beginning: to insert it again fails."""

rarely = st.sampled_from([False, False, False, True])
"""For what changes all that comes after it: a program that does it at once tries little else."""


@dataclass
class RealDatabase:
    """A real database, and a loop to run it in."""

    observer: sqlite3.Connection
    loop: asyncio.AbstractEventLoop
    database: Database[Any]

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Wait for *awaitable*."""

        async def waited() -> Any:
            return await awaitable

        return self.loop.run_until_complete(waited())

    def rows(self) -> set[int]:
        """What is committed, by a connection of its own."""
        return {each for (each,) in self.observer.execute("SELECT id FROM item")}

    def forget(self) -> None:
        """Delete every row but the first."""
        self.observer.execute("DELETE FROM item WHERE id <> ?", [TAKEN])

    def checked_out(self) -> int:
        """How many connections are in use."""
        assert self.database.owned_engine is not None
        pool = self.database.owned_engine.pool
        assert isinstance(pool, sa.AsyncAdaptedQueuePool)
        return pool.checkedout()


@dataclass
class Model:
    """What a person who wrote the program would expect.

    Attributes:
        committed: The rows that everybody sees.

        written: The rows that the open transaction has written, with those still in the session.

        is_begun: Whether a transaction is open in the database.

        is_pending: Whether the session has objects that it has not written yet.

        is_touched: Whether something was written, or tried to be, since the last end.

        is_broken: Whether a flush failed, after which SQLAlchemy wants a rollback.

        is_lost: Whether changes were thrown away by closing the session by hand.
    """

    committed: set[int]
    written: set[int] = field(default_factory=set)
    is_begun: bool = False
    is_pending: bool = False
    is_touched: bool = False
    is_broken: bool = False
    is_lost: bool = False
    is_rollback_only: bool = False
    is_closed_by_hand: bool = False
    outcome: Outcome = Outcome.NOT_BEGUN

    @property
    def state(self) -> State:
        """What the scope should say of itself."""
        if self.is_rollback_only:
            return State.ROLLBACK_ONLY_ACTIVE if self.is_begun else State.ROLLBACK_ONLY_IDLE
        return State.ACTIVE if self.is_begun else State.IDLE

    def write(self, number: int | None) -> None:
        """A statement was run; what was pending went ahead of it."""
        self.is_begun = self.is_touched = True
        self.is_pending = False
        if number is not None:
            self.written.add(number)

    def flush(self) -> None:
        """What was pending is written."""
        if self.is_pending:
            self.write(None)

    def commit(self) -> None:
        """COMMIT, if there is anything to commit."""
        self.flush()
        assert not self.is_begun or not self.is_rollback_only
        self.committed |= self.written
        self._end(Outcome.COMMITTED)

    def roll_back(self) -> None:
        """ROLLBACK, if there is anything to roll back."""
        self._end(Outcome.ROLLED_BACK)

    def _end(self, outcome: Outcome) -> None:
        if self.is_begun:
            self.outcome = outcome
        self.written = set()
        self.is_begun = self.is_pending = self.is_touched = self.is_broken = False


class Program(RuleBasedStateMachine):
    """Anything that a request's code may do to its session, in any order."""

    real: RealDatabase
    programs = 0
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).programs += 1
        self.next_number = TAKEN
        self.committed = {TAKEN}
        self.ended: list[tuple[SessionScope[Any], Any]] = []
        self.begin()

    def begin(self) -> None:
        """A scope begins: the next request."""

        async def make() -> SessionScope[Any]:
            return SessionScope(self.real.database, None, self.real.database.options)

        self.scope: SessionScope[Any] = self.real.run(make())
        self.model = Model(self.committed)

    def number(self) -> int:
        """An id that no row has."""
        self.next_number += 1
        return self.next_number

    def refused(self, *errors: type[Exception]) -> Any:
        """What the next operation has to raise."""
        type(self).steps += 1
        return pytest.raises(errors)

    def is_unusable(self) -> bool:
        """Whether the session refuses every use."""
        return self.model.is_closed_by_hand

    def try_to(self, operation: Callable[[Any], Awaitable[Any]]) -> bool:
        """Do *operation* with the session; `False` if it had to be refused, and was."""
        type(self).steps += 1
        model = self.model
        if self.is_unusable():
            with self.refused(SessionScopeClosedError):
                self.real.run(operation(self.scope.session))
            return False
        if model.is_broken:
            with self.refused(sa.exc.PendingRollbackError):
                self.real.run(operation(self.scope.session))
            return False
        self.real.run(operation(self.scope.session))
        return True

    # ---------------------------------------------------------------- writing

    @rule()
    def insert(self) -> None:
        """A statement writes a row."""
        number = self.number()
        if self.try_to(lambda session: session.execute(sa.insert(Item).values(id=number))):
            self.model.write(number)

    @rule()
    def read(self) -> None:
        """A query sees what this transaction wrote, and what is committed."""
        found: set[int] = set()

        async def select(session: Any) -> None:
            found.update(await session.scalars(sa.select(Item.id)))

        if self.try_to(select):
            touched = self.model.is_touched
            self.model.write(None)
            self.model.is_touched = touched
            assert self.model.committed | self.model.written == found

    @rule()
    def add(self) -> None:
        """An object waits in the session for the next flush."""
        number = self.number()

        async def add(session: Any) -> None:
            session.add(Item(id=number))

        model = self.model
        if self.is_unusable():
            with self.refused(SessionScopeClosedError):
                self.real.run(add(self.scope.session))
        elif not model.is_broken:
            self.real.run(add(self.scope.session))
            model.is_pending = model.is_touched = True
            model.written.add(number)

    @rule()
    def flush(self) -> None:
        """What waits in the session is written."""
        model = self.model
        if self.is_unusable():
            with self.refused(SessionScopeClosedError):
                self.real.run(self.scope.session.flush())
        elif not model.is_broken:
            self.real.run(self.scope.session.flush())
            model.flush()

    @rule()
    def swallow_an_error(self) -> None:
        """A statement fails, and the code goes on as if nothing had happened."""

        async def fail(session: Any) -> None:
            with pytest.raises(sa.exc.IntegrityError):
                await session.execute(sa.insert(Item).values(id=TAKEN))

        if self.try_to(fail):
            self.model.write(None)

    @rule()
    def swallow_an_error_of_a_flush(self) -> None:
        """A flush fails: the transaction is gone, and the session wants to be rolled back."""

        async def fail(session: Any) -> None:
            session.add(Item(id=TAKEN))
            with pytest.raises(sa.exc.IntegrityError):
                await session.flush()

        model = self.model
        if self.is_unusable():
            with self.refused(SessionScopeClosedError):
                self.real.run(fail(self.scope.session))
        elif not model.is_broken:
            self.real.run(fail(self.scope.session))
            model.write(None)
            model.written = set()
            model.is_broken = True

    @rule(fails=st.booleans())
    def savepoint(self, fails: bool) -> None:
        """A block is released, or rolled back to where it began."""
        number = self.number()

        async def nested(session: Any) -> None:
            try:
                async with session.begin_nested():
                    await session.execute(sa.insert(Item).values(id=number))
                    if fails:
                        raise LookupError
            except LookupError:
                pass

        if self.try_to(nested):
            self.model.write(None if fails else number)

    # ---------------------------------------------------------------- ending by hand

    @rule()
    def commit(self) -> None:
        """The code commits by itself."""
        model = self.model
        if self.is_unusable() or model.is_broken:
            self.try_to(lambda session: session.commit())
            return
        model.flush()
        if model.is_begun and model.is_rollback_only:
            with self.refused(RollbackOnlyError):
                self.real.run(self.scope.session.commit())
            return
        self.real.run(self.scope.session.commit())
        model.commit()

    @rule()
    def roll_back(self) -> None:
        """The code rolls back by itself."""
        if self.is_unusable():
            self.try_to(lambda session: session.rollback())
            return
        self.real.run(self.scope.session.rollback())
        self.model.roll_back()

    @rule(fails=st.booleans())
    def block(self, fails: bool) -> None:
        """`async with session.begin()`, where no transaction has begun."""
        number = self.number()
        model = self.model

        async def begin(session: Any) -> None:
            async with session.begin():
                await session.execute(sa.insert(Item).values(id=number))
                if fails:
                    raise LookupError

        if self.is_unusable():
            self.try_to(begin)
        elif self.scope.session.in_transaction():
            with self.refused(sa.exc.InvalidRequestError):
                self.real.run(begin(self.scope.session))
        elif fails:
            with self.refused(LookupError):
                self.real.run(begin(self.scope.session))
            model.write(number)
            model.roll_back()
        elif model.is_rollback_only:
            with self.refused(RollbackOnlyError):
                self.real.run(begin(self.scope.session))
            model.write(number)
            model.roll_back()
        else:
            self.real.run(begin(self.scope.session))
            model.write(number)
            model.commit()

    @rule()
    def close_session(self) -> None:
        """`session.close()`, which is not the code's to do."""
        model = self.model
        self.real.run(self.scope.session.close())
        if not model.is_closed_by_hand:
            model.is_lost = model.is_touched and not model.is_rollback_only
            model.roll_back()
            model.is_closed_by_hand = True

    @rule(does=rarely)
    def set_rollback_only(self, does: bool) -> None:
        """The code forbids to commit, to the end of the scope."""
        if does:
            self.scope.set_rollback_only()
            self.model.is_rollback_only = True

    # ---------------------------------------------------------------- ending by the scope

    @rule(
        status=st.sampled_from([200, 204, 404, 500]),
        raised=rarely,
    )
    def send_head(self, status: int, raised: bool) -> None:
        """The response's head settles the transaction."""
        head = ResponseHead(status, raised=raised)
        self.settle(Cause.HEAD, head, is_success=status < 500 and not raised)

    @rule(cause=st.sampled_from([Cause.COMPLETED, Cause.RELEASED]))
    def settle_a_success(self, cause: Cause) -> None:
        """The body or the background work is complete, or `release()` was called."""
        self.settle(cause, None, is_success=True)

    @rule(cause=st.sampled_from([Cause.NO_HEAD, Cause.TORN, Cause.RAISED]), does=rarely)
    def settle_a_failure(self, cause: Cause, does: bool) -> None:
        """The app raised, or came to no answer."""
        if does:
            self.settle(cause, None, is_success=False)

    @rule(is_success=st.booleans())
    def end(self, is_success: bool) -> None:
        """The scope ends, and the next one begins."""
        cause = Cause.COMPLETED if is_success else Cause.RAISED
        scope, session = self.scope, self.scope.session
        self.settle(cause, None, is_success=is_success, closes=True)
        assert State.CLOSED is scope.state
        assert self.model.outcome is scope.outcome
        self.ended.append((scope, session))
        self.begin()

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def use_what_has_ended(self, data: st.DataObject) -> None:
        """A scope that has ended, and its session, refuse whatever is asked of them."""
        scope, session = data.draw(st.sampled_from(self.ended))
        for use in (session.commit, session.rollback, session.flush):
            with self.refused(SessionScopeClosedError):
                self.real.run(use())
        with self.refused(SessionScopeClosedError):
            session.add(Item(id=self.number()))
        with self.refused(SessionScopeClosedError):
            scope.set_rollback_only()
        assert State.CLOSED is scope.state

    def settle(
        self, cause: Cause, head: ResponseHead | None, *, is_success: bool, closes: bool = False
    ) -> None:
        """Let the scope end its transaction, and the model."""
        model = self.model
        type(self).steps += 1
        decided = self.scope.decide(cause, head)
        expected = is_success and not model.is_rollback_only
        assert (Ending.COMMIT if expected else Ending.ROLLBACK) is decided
        ending = self.scope.close(decided) if closes else self.scope.settle(decided)
        if expected and model.is_lost:
            with self.refused(SessionScopeClosedError):
                self.real.run(ending)
        elif expected and model.is_broken:
            with self.refused(sa.exc.PendingRollbackError):
                self.real.run(ending)
            model.roll_back()
        else:
            assert self.real.run(ending) is None
            model.commit() if expected else model.roll_back()
        model.is_lost = False

    # ---------------------------------------------------------------- what always holds

    @invariant()
    def scope_is_as_the_model(self) -> None:
        """State, outcome, rows and connections are what they should be."""
        model, scope = self.model, self.scope
        assert model.state is scope.state
        assert model.outcome is scope.outcome
        assert model.is_rollback_only == scope.is_rollback_only
        assert model.committed == self.real.rows()
        if not model.is_broken:
            assert model.is_begun == self.real.checked_out()

    def teardown(self) -> None:
        """The last scope ends; nothing is left, and the next program begins afresh."""
        self.real.run(self.scope.close(Ending.ROLLBACK))
        assert State.CLOSED is self.scope.state
        assert 0 == self.real.checked_out()
        self.real.forget()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[RealDatabase]:
    """A database on a file, with one row, and a loop."""
    path = tmp_path / "machine.db"
    loop = asyncio.new_event_loop()
    database = Database(f"sqlite+aiosqlite:///{path}")
    observer = sqlite3.connect(path, isolation_level=None)
    observer.execute("PRAGMA journal_mode = WAL")
    observer.execute("PRAGMA synchronous = OFF")
    real = RealDatabase(observer, loop, database)

    async def create() -> None:
        assert isinstance(database.owned_engine, AsyncEngine)
        async with database.owned_engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(sa.insert(Item).values(id=TAKEN))

    real.run(create())
    yield real
    observer.close()
    real.run(database.dispose())
    loop.close()


@pytest.mark.once
def test_random_programs_end_as_the_model_says(real: RealDatabase) -> None:
    """G4, G9, G10, G19: Whatever a program does to its session, the scope and the model agree."""

    class Machine(Program):
        pass

    Machine.real = real
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=150,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

    logging.getLogger(__name__).info("%d programs, %d steps", Machine.programs, Machine.steps)
    assert 150 <= Machine.programs
