"""What a program of transactional blocks has to do, by an interpreter that is obviously right.

It knows rows, transactions and savepoints as sets on a stack, and nothing of SQLAlchemy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from tests.block_programs import (
    ERRORS,
    RULED,
    Add,
    Begin,
    Block,
    Commit,
    Fail,
    FailFlush,
    Hook,
    Mode,
    Orphan,
    Program,
    Raise,
    Read,
    Release,
    Request,
    Rollback,
    Savepoint,
    Scope,
    SetRollbackOnly,
    Statement,
    Stop,
    Swallow,
    Write,
)

Became = Literal["COMMITTED", "ROLLED_BACK", "NOT_BEGUN"]


class Refused(Exception):  # noqa: N818 - the model's stand-in for errors of the package
    """An error of the package's or of SQLAlchemy's."""

    def __init__(self, name: str, cause: BaseException | None = None) -> None:
        super().__init__(name)
        self.name = name
        self.cause = cause


def describe(error: BaseException | None) -> str:
    """*error* as the log has it: its type, where it was raised, and its cause if that matters."""
    if error is None:
        return "None"
    name = error.name if isinstance(error, Refused) else type(error).__name__
    if name in ERRORS:
        return f"{name}({error.args[0]})"
    if name not in {"IntegrityError", "DBAPIError"}:
        named = {cls.__name__ for cls in type(error).__mro__}
        name = "DBAPIError" if "DBAPIError" in named else name
    if name == "RollbackOnlyError":
        cause = error.cause if isinstance(error, Refused) else error.__cause__
        return f"{name} from {describe(cause)}"
    return name


@dataclass(eq=False)
class Level:
    """A transaction, or a savepoint in it.

    Attributes:
        rows: What was written in it and is not undone.

        orphans: Those that COMMIT will refuse.

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
class Owed:
    """A hook that waits, or a failure that forbids the COMMIT, and where it came about."""

    content: Hook | BaseException
    level: Level
    is_undone: bool = False


@dataclass(eq=False)
class Unit:
    """What has a transaction (no savepoint of its own) or a savepoint to end."""

    is_rollback_only: bool = False


class Session:
    """A session scope.

    Attributes:
        units: Who has something to end, innermost last; outside of them statements belong to no
            transaction of ours.

        levels: The transaction, and the savepoints in it.

        blocks: The savepoints whose `async with` has not been left.

        pending: Rows that wait for a flush; they are in the last of the levels.

        has_written: Whether something was written since the last end.

        has_begun: Whether SQLAlchemy has a transaction.

        is_by_hand: Whether the user's own `session.begin()` began it.

        is_open: Whether the database has a transaction of it open.

        is_aborted: Whether the database has refused a statement, and will refuse all others.

        has_connection: Whether it holds a connection.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.units: list[Unit] = [Unit()] if mode == "transaction" else []
        self.is_rollback_only = False
        self.blocks: list[Level] = []
        self.later: list[tuple[Hook, Became]] = []
        self.begin()

    def begin(self) -> None:
        """The next transaction."""
        self.levels = [Level()]
        self.hooks: list[Owed] = []
        self.failures: list[Owed] = []
        self.pending: set[int] = set()
        self.has_written = self.has_begun = self.is_open = self.has_connection = False
        self.is_by_hand = self.is_aborted = False

    def begin_again(self) -> None:
        """The same, for the same hooks: nothing was asked of the database."""
        hooks = self.hooks
        [transaction] = self.levels
        transaction.is_over = True
        self.begin()
        self.hooks = hooks
        for each in hooks:
            each.level = self.levels[0]

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
    def failure(self) -> BaseException | None:
        """The first failure that nobody healed."""
        return self.failure_in(self.levels)

    def failure_in(self, levels: Sequence[Level]) -> BaseException | None:
        """The first failure in one of *levels*."""
        for each in self.failures:
            if each.level in levels:
                assert isinstance(each.content, BaseException)
                return each.content
        return None

    def check_usable(self) -> None:
        """SQLAlchemy refuses a block's session from the end of its savepoint to the block's."""
        if self.blocks and (self.blocks[-1].is_over or self.blocks[-1].is_broken):
            raise Refused("InvalidRequestError")
        if self.levels[-1].is_broken:
            raise Refused("PendingRollbackError")

    def release(self, savepoint: Level) -> None:
        """What is in *savepoint* is part of what is around it now."""
        if savepoint.is_over:
            return
        assert not self.pending
        self._remove(savepoint)
        around = self.levels[-1]
        around.rows |= savepoint.rows
        around.orphans |= savepoint.orphans
        for each in self.hooks + self.failures:
            if each.level is savepoint:
                each.level = around

    def roll_back_to(self, savepoint: Level) -> None:
        """What is in *savepoint* is undone."""
        if savepoint.is_over:
            return
        self.undo(savepoint)
        self._remove(savepoint)
        for each in self.hooks:
            if each.level is savepoint:
                each.level = self.levels[-1]

    def undo(self, savepoint: Level) -> None:
        """Nothing of what is in *savepoint* remains."""
        if savepoint.is_set:
            self.is_aborted = False
        self.pending, savepoint.rows, savepoint.orphans = set(), set(), set()
        self.failures = [each for each in self.failures if each.level is not savepoint]
        for each in self.hooks:
            if each.level is savepoint:
                each.is_undone = True

    def _remove(self, savepoint: Level) -> None:
        assert savepoint is self.levels.pop()
        savepoint.is_over = True


class Model:
    """One run of a program.

    Attributes:
        committed: The rows that everybody sees.

        log: What was seen from inside the program.

        left_out: What is not to be done: writes that a database with a single writer would not let
            through, and COMMITs by hand that fail (SQLAlchemy's session is of no use after that).

        status: The response's, if there was one.

        connections: How many connections were in use at once.
    """

    def __init__(self, *, is_sync: bool, has_single_writer: bool) -> None:
        self.committed: set[int] = set()
        self.log: list[str] = []
        self.left_out: set[int] = set()
        self.status: int | None = None
        self.connections = 0
        self._is_sync = is_sync
        self._has_single_writer = has_single_writer
        self._aborts = not has_single_writer
        self._sessions: list[Session] = []
        self._is_request = False

    # ---------------------------------------------------------------- programs

    def run(self, program: Program) -> None:
        """Run *program* to its end."""
        try:
            if isinstance(program, Request):
                self._request(program)
            elif program.mode is None:
                self._body(program.body)
            else:
                self._scope(program.mode, program.body)
        except (Exception, Stop) as error:
            self.log.append(f"raised {describe(error)}")

    def _request(self, program: Request) -> None:
        session = Session(program.mode)
        self._is_request = True
        with self._inside(session):
            error = self._caught(program.body)
            if error is None:
                error = self._head(session, program)
            else:
                self._end(session, "ROLLED_BACK")
            if error is None:
                self.status = program.status
                error = self._caught(program.background)
                commits = error is None and not session.forbids_commit and session.failure is None
                committing = commits and not session.is_the_users
                with suppress(Refused):  # the response is out: nobody is told but the log
                    self._end(session, "COMMITTED" if committing else "ROLLED_BACK")
        if error is not None:
            raise error

    def _head(self, session: Session, program: Request) -> BaseException | None:
        commits = (
            not session.is_the_users
            and program.status < 500
            and not program.is_handled
            and not session.forbids_commit
        )
        failure = session.failure if commits else None
        commits = commits and failure is None
        try:
            error = self._end(session, "COMMITTED" if commits else "ROLLED_BACK")
        except Refused as refused:
            return refused
        if failure is not None and program.status < 400:
            return Refused("RollbackOnlyError", failure)
        return error

    def _caught(self, body: Sequence[Statement]) -> BaseException | None:
        try:
            self._body(body)
        except (Exception, Stop) as error:
            return error
        return None

    # ---------------------------------------------------------------- statements

    def _body(self, body: Sequence[Statement]) -> None:
        for each in body:
            self._statement(each)

    def _statement(self, statement: Statement) -> None:  # noqa: PLR0912 - one case per statement
        match statement:
            case Write():
                self._write(statement.id)
            case Add():
                self._add(statement.id)
            case Orphan():
                self._add_orphan(statement.id)
            case Fail():
                self._fail()
            case FailFlush():
                self._fail_flush(statement.id)
            case Read():
                self._read()
            case Commit():
                self._commit(statement.id)
            case Release():
                self._release(statement.id)
            case Rollback():
                self._roll_back()
            case SetRollbackOnly():
                self._set_rollback_only()
            case Raise():
                raise ERRORS[statement.error](statement.id)
            case Hook():
                self._register(statement)
            case Swallow():
                self._swallow(statement.body)
            case Savepoint():
                self._savepoint(statement.body)
            case Begin():
                self._begin_by_hand(statement.body)
            case Block():
                with self._told(f"{statement.propagation} {statement.id}"):
                    self._block(statement)
            case Scope():
                with self._told(f"scope {statement.id}"):
                    self._scope(statement.mode, statement.body)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, Stop) as error:
            self.log.append(f"{name}: {describe(error)}")
            raise
        self.log.append(f"{name}: done")

    def _swallow(self, body: Sequence[Statement]) -> None:
        try:
            self._body(body)
        except Exception as error:
            self.log.append(f"swallowed {describe(error)}")

    @property
    def _session(self) -> Session:
        if not self._sessions:
            raise Refused("NoSessionScopeError")
        return self._sessions[-1]

    def _use(self) -> Session:
        session = self._session
        session.check_usable()
        session.has_begun = True
        session.is_open = not session.is_durable
        session.has_connection = True
        in_use = sum(each.has_connection for each in self._sessions)
        self.connections = max(self.connections, in_use)
        self._flush(session)
        self._set_savepoints(session)
        return session

    def _set_savepoints(self, session: Session) -> None:
        if session.is_aborted:
            raise Refused("DBAPIError")
        for each in session.levels:
            each.is_set = True

    def _fail(self) -> NoReturn:
        session = self._use()
        session.is_aborted = self._aborts and not session.is_durable
        raise Refused("DBAPIError")

    def _flush(self, session: Session) -> None:
        rows, session.pending = session.pending, set()
        if rows:
            self._use()
            self._set_savepoints(session)
            (self.committed if session.is_durable else session.levels[-1].rows).update(rows)

    def _is_locked(self, number: int) -> bool:
        """Whether another session of the program has the database's only place for a writer."""
        others = [each for each in self._sessions if each is not self._session]
        if self._has_single_writer and any(each.is_open for each in others):
            self.left_out.add(number)
            return True
        return False

    def _write(self, number: int) -> None:
        if not self._is_locked(number):
            self._use()
            self._session.has_written = True
            self._session.pending.add(number)
            self._flush(self._session)

    def _add(self, number: int) -> None:
        if self._session.is_aborted or self._session.levels[-1].is_broken:
            self.left_out.add(number)  # SQLAlchemy only warns
        elif not self._is_locked(number):
            self._session.check_usable()
            self._session.has_written = True
            self._session.has_begun = True
            self._session.pending.add(number)

    def _add_orphan(self, number: int) -> None:
        if not self._is_locked(number):
            session = self._use()
            session.has_written = True
            if session.is_durable:
                raise Refused("IntegrityError")
            session.levels[-1].orphans.add(number)

    def _fail_flush(self, number: int) -> None:
        if self._session.is_aborted:
            self.left_out.add(number)
        elif not self._is_locked(number):
            session = self._use()
            session.has_written = True
            level = session.levels[-1]
            level.is_broken = True
            if level is session.levels[0]:
                level.rows, level.orphans = set(), set()
            else:
                session.undo(level)
            raise Refused("IntegrityError")

    def _read(self) -> None:
        session = self._use()
        seen = self.committed.union(*(each.rows for each in session.levels))
        self.log.append(f"sees {sorted(seen)}")

    def _would_fail(self, number: int) -> bool:
        session = self._session
        if session.is_aborted or any(each.orphans or each.is_broken for each in session.levels):
            self.left_out.add(number)
            return True
        return False

    def _commit(self, number: int) -> None:
        session = self._session
        if self._would_fail(number):
            return
        if not session.is_durable and session.failure is not None:
            raise Refused("RollbackOnlyError", session.failure)
        if session.forbids_commit and len(session.levels) > 1:
            raise Refused("RollbackOnlyError")
        session.check_usable()
        if session.forbids_commit:
            self._flush(session)
            if session.is_open:
                raise Refused("RollbackOnlyError")
        else:
            self._surface(self._end(session, "COMMITTED"))

    def _release(self, number: int) -> None:
        session = self._session
        if self._would_fail(number):
            return
        if len(session.units) > (session.mode == "transaction"):
            raise Refused("ConfigurationError")
        if session.forbids_commit:
            self._surface(self._end(session, "ROLLED_BACK"))
        elif session.failure is not None:
            raise Refused("RollbackOnlyError", session.failure)
        else:
            self._surface(self._end(session, "COMMITTED"))

    def _roll_back(self) -> None:
        self._surface(self._end(self._session, "ROLLED_BACK"))

    def _set_rollback_only(self) -> None:
        session = self._session
        if session.units:
            session.units[-1].is_rollback_only = True
        elif session.mode == "autocommit":
            raise Refused("ConfigurationError")
        else:
            session.is_rollback_only = True

    def _savepoint(self, body: Sequence[Statement]) -> None:
        session = self._session
        if session.is_durable:
            raise Refused("ConfigurationError")
        savepoint = self._set_savepoint(session)
        session.blocks.append(savepoint)
        try:
            self._body(body)
        except BaseException:
            session.roll_back_to(savepoint)
            raise
        else:
            self._release_savepoint(savepoint, is_ours=False)
        finally:
            assert savepoint is session.blocks.pop()

    def _set_savepoint(self, session: Session) -> Level:
        if session.levels[-1].is_broken:
            raise Refused("PendingRollbackError")
        session.check_usable()
        self._flush(session)
        session.has_begun = True
        savepoint = Level()
        session.levels.append(savepoint)
        return savepoint

    def _release_savepoint(self, savepoint: Level, *, is_ours: bool) -> None:
        session = self._session
        if savepoint.is_over:
            return
        self._flush(session)
        if session.is_aborted and savepoint.is_set:
            session.roll_back_to(savepoint)
            raise Refused("TransactionAbortedError")
        if savepoint.is_broken and is_ours:
            session.roll_back_to(savepoint)
            raise Refused("PendingRollbackError")
        session.release(savepoint)

    def _begin_by_hand(self, body: Sequence[Statement]) -> None:
        session = self._session
        if session.has_begun and not session.is_durable:
            raise Refused("InvalidRequestError")
        session.check_usable()
        if session.is_durable:
            self._surface(self._end(session, "COMMITTED"))
        session.has_begun = session.is_by_hand = True
        [transaction] = session.levels
        session.blocks.append(transaction)
        error = self._caught(body)
        assert transaction is session.blocks.pop()
        if transaction.is_over:
            self._surface(error)
            return
        if transaction.is_broken:
            hook_error = self._end(session, "ROLLED_BACK")
            self._surface(error or hook_error)
            return
        if error is None and session.is_aborted:
            error = Refused("TransactionAbortedError")
        if error is None and session.failure is not None:
            error = Refused("RollbackOnlyError", session.failure)
        if error is None and session.forbids_commit:
            self._flush(session)
            if not session.is_open:
                session.begin_again()
                return
            error = Refused("RollbackOnlyError")
        hook_error = self._end(session, "COMMITTED" if error is None else "ROLLED_BACK")
        self._surface(error or hook_error)

    # ---------------------------------------------------------------- blocks

    def _block(self, block: Block) -> None:
        session = self._session if self._sessions else None
        is_in_transaction = session is not None and session.is_in_transaction
        match block.propagation:
            case "MANDATORY" if not is_in_transaction:
                raise Refused("TransactionRequiredError")
            case "NEVER" if is_in_transaction:
                raise Refused("TransactionForbiddenError")
            case "REQUIRES_NEW":
                self._scope("transaction", block.body, block)
            case "REQUIRED" | "NESTED" if session is None:
                self._scope("transaction", block.body, block)
            case "REQUIRED" | "NESTED" if not is_in_transaction:
                self._begin(block)
            case "NESTED":
                self._nest(block)
            case "NOT_SUPPORTED" if is_in_transaction:
                self._scope("autocommit", block.body, block)
            case "SUPPORTS" | "NOT_SUPPORTED" | "NEVER" if session is None:
                self._scope("autocommit", block.body, block)
            case _ if is_in_transaction:
                self._join(block)
            case _:
                self._body(block.body)

    def _join(self, block: Block) -> None:
        session = self._session
        try:
            self._body(block.body)
        except BaseException as error:
            if rolls_back(error, block):
                session.failures.append(Owed(error, session.levels[-1]))
            raise

    def _nest(self, block: Block) -> None:
        session = self._session
        savepoint = self._set_savepoint(session)
        unit = Unit()
        session.units.append(unit)
        error = self._caught(block.body)
        session.units.remove(unit)
        if savepoint.is_over:  # with the whole transaction: it is like a joined block since then
            undoes = session.is_open and (unit.is_rollback_only or rolls_back(error, block))
            if undoes and error is not None:
                session.failures.append(Owed(error, session.levels[-1]))
            elif undoes:
                self._set_rollback_only()
            self._surface(error)
            return
        failure = None if unit.is_rollback_only else session.failure_in([savepoint])
        if unit.is_rollback_only or failure is not None or rolls_back(error, block):
            session.roll_back_to(savepoint)
        else:
            self._release_savepoint(savepoint, is_ours=True)
        self._surface(error)
        if failure is not None:
            raise Refused("RollbackOnlyError", failure)

    def _begin(self, block: Block) -> None:
        """A transaction on a session that has none of ours: reads that are open there end."""
        session = self._session
        if session.is_the_users and (session.has_written or len(session.levels) > 1):
            raise Refused("ConfigurationError")
        self._surface(self._end(session, "ROLLED_BACK" if session.forbids_commit else "COMMITTED"))
        self._unit(session, Unit(), block.body, block)

    def _scope(self, mode: Mode, body: Sequence[Statement], block: Block | None = None) -> None:
        session = Session(mode)
        with self._inside(session):
            if mode == "transaction":
                self._unit(session, session.units.pop(), body, block)
            else:
                error = self._caught(body)
                commits = not (session.is_the_users or rolls_back(error, block))
                hook_error = self._end(session, "COMMITTED" if commits else "ROLLED_BACK")
                self._surface(error or hook_error)

    def _unit(
        self, session: Session, unit: Unit, body: Sequence[Statement], block: Block | None
    ) -> None:
        session.units.append(unit)
        error = self._caught(body)
        is_rollback_only = session.forbids_commit
        failure = None if is_rollback_only else session.failure
        commits = not (is_rollback_only or failure is not None or rolls_back(error, block))
        if commits:
            self._flush(session)
        session.units.remove(unit)
        hook_error = self._end(session, "COMMITTED" if commits else "ROLLED_BACK")
        self._surface(error)
        if failure is not None:
            raise Refused("RollbackOnlyError", failure)
        self._surface(hook_error)

    @contextmanager
    def _inside(self, session: Session) -> Iterator[None]:
        self._sessions.append(session)
        try:
            yield
        finally:
            assert session is self._sessions.pop()
            self._call_later(session)

    def _waits_for(self, session: Session) -> Session:
        """Whose end an after-response hook waits for: the request's, if there is one."""
        return self._sessions[0] if self._is_request else session

    def _call_later(self, session: Session) -> None:
        later, session.later = session.later, []
        for hook, became in later:
            self._call(hook, became)

    def _surface(self, error: BaseException | None) -> None:
        if error is not None:
            raise error

    # ---------------------------------------------------------------- ends

    def _end(self, session: Session, outcome: Became) -> BaseException | None:
        """The transaction is over; returns the error of a hook that wants it seen.

        Raises:
            Refused: If COMMIT fails.
        """
        error: BaseException | None = None
        if outcome == "COMMITTED":
            self._flush(session)
            if session.levels[0].is_broken:
                outcome, error = "ROLLED_BACK", Refused("PendingRollbackError")
            elif session.is_aborted:
                outcome, error = "ROLLED_BACK", Refused("TransactionAbortedError")
            elif any(each.orphans for each in session.levels):
                outcome, error = "ROLLED_BACK", Refused("IntegrityError")
        for each in session.levels:
            if outcome == "COMMITTED":
                self.committed |= each.rows
            each.is_over = True
        hooks = session.hooks
        session.begin()
        first: BaseException | None = None
        for waiting in hooks:
            assert isinstance(waiting.content, Hook)
            hook, became = waiting.content, "ROLLED_BACK" if waiting.is_undone else outcome
            if hook.on != "completion" and RUNS_AFTER[hook.on] != became:
                continue
            if hook.when == "after_response":
                self._waits_for(session).later.append((hook, became))
            else:
                hook_error = self._call(hook, became)
                first = first or (hook_error if hook.on_error == "raise" else None)
        self._surface(error)
        return first

    def _register(self, hook: Hook) -> None:
        session = self._session if self._sessions else None
        if session is not None and not session.is_durable:
            session.hooks.append(Owed(hook, session.levels[-1]))
        elif hook.on == "rollback":
            return
        elif session is not None and hook.when == "after_response":
            self._waits_for(session).later.append((hook, "NOT_BEGUN"))
        else:
            error = self._call(hook, "NOT_BEGUN", has_scope=self._is_sync or not hook.is_plain)
            if hook.on_error == "raise" and (hook.is_plain or self._is_sync):
                self._surface(error)

    def _call(self, hook: Hook, became: Became, *, has_scope: bool = True) -> BaseException | None:
        told = f" {became}" if hook.on == "completion" else ""
        self.log.append(f"on_{hook.on} {hook.id}{told}")
        try:
            if has_scope:
                self._scope("transaction", hook.body)
            else:
                self._body(hook.body)
        except Exception as error:
            return error
        return None


RUNS_AFTER = {"commit": "COMMITTED", "rollback": "ROLLED_BACK"}


def rolls_back(error: BaseException | None, block: Block | None) -> bool:
    """Whether *error* rolls back what it passes the end of: the nearest class with a rule says."""
    if error is None:
        return False
    for cls in type(error).__mro__:
        for name, ruled in RULED.items():
            if block is not None and cls is ruled and name in block.rollback_for:
                return True
            if block is not None and cls is ruled and name in block.no_rollback_for:
                return False
    return True
