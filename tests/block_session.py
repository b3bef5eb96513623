"""The model of one session: its transaction and savepoints are sets of rows on a stack.

What an error of the database does, and which use SQLAlchemy refuses when, is here; what blocks and
hooks make of it is the interpreter's (`block_model`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tests.block_programs import ERRORS, Hook, Mode

Became = Literal["COMMITTED", "ROLLED_BACK", "NOT_BEGUN"]


class Refused(Exception):  # noqa: N818 - the model's stand-in for errors of the package
    """An error of the package's, SQLAlchemy's or the database's."""

    def __init__(self, name: str, cause: BaseException | None = None) -> None:
        super().__init__(name)
        self.name = name
        self.cause = cause


def describe(error: BaseException | None) -> str:
    """*error* as the log has it: its type, where it was raised, and its cause if that matters."""
    if error is None:
        return "None"
    names = [cls.__name__ for cls in type(error).__mro__]
    name = error.name if isinstance(error, Refused) else names[0]
    if name in ERRORS:
        return f"{name}({error.args[0]})"
    if name == "RollbackOnlyError":
        cause = error.cause if isinstance(error, Refused) else error.__cause__
        return f"{name} from {describe(cause)}"
    if "DBAPIError" in names and name != "IntegrityError":
        return "DBAPIError"  # what drivers call it differs
    return name


@dataclass(eq=False)
class Level:
    """A transaction, or a savepoint in it.

    Attributes:
        rows: What was written in it and is not undone.

        orphans: What was written in it and COMMIT will refuse.

        is_set: Whether the database knows of it: a savepoint is set by the first statement in it.

        is_broken: Whether SQLAlchemy has rolled it back, and refuses use until its end.

        is_over: Whether it was ended: by its block, or by the user's `commit()` or `rollback()`.
    """

    rows: set[int] = field(default_factory=set)
    orphans: set[int] = field(default_factory=set)
    is_set: bool = False
    is_broken: bool = False
    is_over: bool = False


@dataclass(eq=False)
class Waiting:
    """A hook that waits for the end, and the level it was registered in."""

    hook: Hook
    level: Level
    is_undone: bool = False


@dataclass(eq=False)
class Failure:
    """What forbids the COMMIT, and the level it came about in."""

    error: BaseException
    level: Level


@dataclass(eq=False)
class Unit:
    """A scope or a block with a transaction or savepoint of its own to end."""

    is_rollback_only: bool = False


class Session:
    """A session, and the scope it belongs to.

    Attributes:
        units: Those that are open, innermost last; outside of them the session is in no transaction
            of ours.

        levels: The transaction, and the savepoints in it.

        managers: Those levels whose `async with` is the user's own and has not been left.

        later: Hooks that wait for the end of the scope.

        pending: Rows that wait for a flush; they are in the last of the levels.

        hooks: Those that wait for the end of the transaction.

        failures: What forbids the transaction's COMMIT.

        has_written: Whether something was written since the last end.

        has_begun: Whether SQLAlchemy has a transaction.

        is_by_hand: Whether the user's own `session.begin()` began it.

        is_open: Whether the database has one.

        is_aborted: Whether the database has refused a statement, and will refuse all others.

        has_connection: Whether it holds a connection.
    """

    def __init__(self, mode: Mode, committed: set[int], *, aborts: bool) -> None:
        self.mode = mode
        self.units: list[Unit] = []
        self.managers: list[Level] = []
        self.later: list[tuple[Hook, Became]] = []
        self.is_rollback_only = False
        self._committed = committed
        self._aborts = aborts
        self._begin()

    def _begin(self) -> None:
        self.levels = [Level()]
        self.hooks: list[Waiting] = []
        self.failures: list[Failure] = []
        self.pending: set[int] = set()
        self.has_written = self.has_begun = self.is_open = self.has_connection = False
        self.is_by_hand = self.is_aborted = False

    # ---------------------------------------------------------------- questions

    @property
    def is_in_transaction(self) -> bool:
        """Whether a block joins."""
        return bool(self.units) or self.is_by_hand

    @property
    def is_durable(self) -> bool:
        """Whether each statement is committed by itself."""
        return self.mode == "autocommit" and not self.is_in_transaction

    @property
    def is_the_users(self) -> bool:
        """Whether only the user's code commits."""
        return self.mode == "manual" and not self.units

    @property
    def forbids_commit(self) -> bool:
        """Whether the code asked for a rollback."""
        return self.is_rollback_only or any(each.is_rollback_only for each in self.units)

    @property
    def can_commit(self) -> bool:
        """Whether the database, and SQLAlchemy, would let a COMMIT through."""
        return not (self.is_aborted or any(each.orphans or each.is_broken for each in self.levels))

    @property
    def failure(self) -> BaseException | None:
        """The first failure that nobody healed."""
        return self.failure_in(*self.levels)

    def failure_in(self, *levels: Level) -> BaseException | None:
        """The first failure in one of *levels*."""
        found = (each.error for each in self.failures if each.level in levels)
        return next(found, None)

    def check_usable(self) -> None:
        """SQLAlchemy refuses use from the early end of a savepoint to the end of its block."""
        if self.managers and (self.managers[-1].is_over or self.managers[-1].is_broken):
            raise Refused("InvalidRequestError")
        if self.levels[-1].is_broken:
            raise Refused("PendingRollbackError")

    # ---------------------------------------------------------------- statements

    def use(self) -> None:
        """A statement goes to the database, after what waits for a flush."""
        self.check_usable()
        self.has_begun = self.has_connection = True
        self.is_open = not self.is_durable
        if self.is_aborted:
            raise Refused("DBAPIError")
        for each in self.levels:
            each.is_set = True
        rows = self._committed if self.is_durable else self.levels[-1].rows
        rows |= self.pending
        self.pending = set()

    def flush(self) -> None:
        """What waits for it goes to the database."""
        if self.pending:
            self.use()

    def read(self) -> list[int]:
        """The rows that are seen."""
        self.use()
        return sorted(self._committed.union(*(each.rows for each in self.levels)))

    def add(self, row: int) -> None:
        """A row waits for the next flush."""
        self.check_usable()
        self.has_written = self.has_begun = True
        self.pending.add(row)

    def write(self, row: int) -> None:
        """A row is written."""
        self.use()
        self.add(row)
        self.flush()

    def write_orphan(self, row: int) -> None:
        """A row is written that only COMMIT refuses."""
        self.use()
        self.has_written = True
        if self.is_durable:
            raise Refused("IntegrityError")
        self.levels[-1].orphans.add(row)

    def fail(self) -> None:
        """The database refuses a statement."""
        self.use()
        self.is_aborted = self._aborts and not self.is_durable
        raise Refused("DBAPIError")

    def fail_flush(self) -> None:
        """The database refuses a flush: SQLAlchemy rolls back the savepoint or transaction."""
        self.use()
        self.has_written = True
        level = self.levels[-1]
        level.is_broken = True
        level.rows, level.orphans = set(), set()
        if level is not self.levels[0]:
            self._heal(level)
        raise Refused("IntegrityError")

    # ---------------------------------------------------------------- savepoints

    def set_savepoint(self) -> Level:
        """A savepoint, in what is there."""
        if self.levels[-1].is_broken:
            raise Refused("PendingRollbackError")
        self.check_usable()
        self.flush()
        self.has_begun = True
        savepoint = Level()
        self.levels.append(savepoint)
        return savepoint

    def release(self, savepoint: Level) -> None:
        """What is in *savepoint* is part of what is around it now."""
        if savepoint.is_over:
            return
        self.flush()
        if self.is_aborted:
            self.roll_back_to(savepoint)
            raise Refused("TransactionAbortedError")
        around = self._leave(savepoint)
        around.rows |= savepoint.rows
        around.orphans |= savepoint.orphans

    def roll_back_to(self, savepoint: Level) -> None:
        """Nothing of what is in *savepoint* remains."""
        if not savepoint.is_over:
            self.pending = set()
            if savepoint.is_set:
                self.is_aborted = False
            self._heal(savepoint)
            self._leave(savepoint)

    def _heal(self, savepoint: Level) -> None:
        self.failures = [each for each in self.failures if each.level is not savepoint]
        for each in self.hooks:
            each.is_undone = each.is_undone or each.level is savepoint

    def _leave(self, savepoint: Level) -> Level:
        assert savepoint is self.levels.pop()
        savepoint.is_over = True
        around = self.levels[-1]
        entries: list[Waiting | Failure] = [*self.hooks, *self.failures]
        for each in entries:
            if each.level is savepoint:
                each.level = around
        return around

    # ---------------------------------------------------------------- ends

    def end(self, outcome: Became) -> tuple[list[tuple[Hook, Became]], Refused | None]:
        """COMMIT or ROLLBACK: the hooks with what became of them, and why COMMIT was refused."""
        refusal: Refused | None = None
        if outcome == "COMMITTED":
            self.flush()
            if self.levels[0].is_broken:
                refusal = Refused("PendingRollbackError")
            elif self.is_aborted:
                refusal = Refused("TransactionAbortedError")
            elif any(each.orphans for each in self.levels):
                refusal = Refused("IntegrityError")
        became: Became = outcome if refusal is None else "ROLLED_BACK"
        for each in self.levels:
            each.is_over = True
            if became == "COMMITTED":
                self._committed |= each.rows
        hooks: list[tuple[Hook, Became]] = [
            (each.hook, "ROLLED_BACK" if each.is_undone else became) for each in self.hooks
        ]
        self._begin()
        return hooks, refusal

    def end_unbegun(self) -> None:
        """SQLAlchemy's transaction is over, of which the database never heard; hooks go on."""
        hooks = self.hooks
        for each in self.levels:
            each.is_over = True
        self._begin()
        self.hooks = [Waiting(each.hook, self.levels[0], each.is_undone) for each in hooks]
