"""What a program of transactional blocks has to do, by an interpreter that is obviously right.

It knows rows, transactions and savepoints as sets on a stack, and nothing of SQLAlchemy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

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
from tests.block_session import Became, Failure, Refused, Session, Unit, Waiting, describe

RUNS_AFTER = {"commit": {"COMMITTED"}, "rollback": {"ROLLED_BACK"}}


class Model:
    """One run of a program.

    Attributes:
        committed: The rows that everybody sees.

        log: What was seen from inside the program.

        left_out: What is not to be done: writes that a database with a single writer would not let
            through, and what SQLAlchemy's session is of no use after.

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
        self._sessions: list[Session] = []
        self._is_request = False
        self._statements: dict[type, Callable[[Any], None]] = {
            Write: lambda it: self._session.write(it.id),
            Add: lambda it: self._session.add(it.id),
            Orphan: lambda it: self._session.write_orphan(it.id),
            Fail: lambda it: self._session.fail(),
            FailFlush: lambda it: self._session.fail_flush(),
            Read: lambda it: self.log.append(f"sees {self._session.read()}"),
            Commit: lambda it: self._commit(),
            Release: lambda it: self._release(),
            Rollback: lambda it: self._end(self._session, "ROLLED_BACK"),
            SetRollbackOnly: lambda it: self._set_rollback_only(),
            Raise: lambda it: _surface(ERRORS[it.error](it.id)),
            Hook: self._register,
            Swallow: lambda it: self._swallow(it.body),
            Savepoint: lambda it: self._savepoint(it.body),
            Begin: lambda it: self._begin_by_hand(it.body),
            Scope: self._own_scope,
            Block: self._block,
        }

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
        self._is_request = True
        with self._opened(program.mode) as session:
            if program.mode == "transaction":
                session.units.append(Unit())
            error = self._caught(program.body)
            if error is not None:
                self._end(session, "ROLLED_BACK", is_quiet=True)
                raise error
            self._head(session, program)
            self.status = program.status
            error = self._caught(program.background)
            is_good = error is None and session.failure is None and not session.forbids_commit
            commits = is_good and not session.is_the_users
            with suppress(Exception):  # the response is out: nobody is told but the log
                self._end(session, "COMMITTED" if commits else "ROLLED_BACK")
            _surface(error)

    def _head(self, session: Session, program: Request) -> None:
        is_success = program.status < 500 and not program.is_handled
        commits = is_success and not (session.is_the_users or session.forbids_commit)
        failure = session.failure if commits else None
        if failure is None:
            self._end(session, "COMMITTED" if commits else "ROLLED_BACK")
        elif program.status < 400:
            self._end(session, "ROLLED_BACK", is_quiet=True)
            raise Refused("RollbackOnlyError", failure)
        else:
            self._end(session, "ROLLED_BACK")

    # ---------------------------------------------------------------- statements

    def _body(self, body: Sequence[Statement]) -> None:
        for statement in body:
            if self._is_to_be_left_out(statement):
                self.left_out.add(getattr(statement, "id", 0))
            else:
                self._statements[type(statement)](statement)
                in_use = sum(each.has_connection for each in self._sessions)
                self.connections = max(self.connections, in_use)

    def _is_to_be_left_out(self, statement: Statement) -> bool:
        if not self._sessions:
            return False
        *others, session = self._sessions
        if isinstance(statement, (Commit, Release)):
            return not session.can_commit
        is_unusable = session.is_aborted or session.levels[-1].is_broken
        if isinstance(statement, (Add, FailFlush)) and is_unusable:
            return True  # SQLAlchemy only warns
        writes = isinstance(statement, (Write, Add, Orphan, FailFlush))
        return writes and self._has_single_writer and any(each.is_open for each in others)

    def _caught(self, body: Sequence[Statement]) -> BaseException | None:
        try:
            self._body(body)
        except (Exception, Stop) as error:
            return error
        return None

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

    def _commit(self) -> None:
        session = self._session
        if not session.is_durable and session.failure is not None:
            raise Refused("RollbackOnlyError", session.failure)
        if session.forbids_commit and len(session.levels) > 1:
            raise Refused("RollbackOnlyError")
        session.check_usable()
        if not session.forbids_commit:
            self._end(session, "COMMITTED")
            return
        session.flush()
        if session.is_open:
            raise Refused("RollbackOnlyError")
        session.end_unbegun()

    def _release(self) -> None:
        session = self._session
        if len(session.units) > (session.mode == "transaction"):
            raise Refused("ConfigurationError")
        if session.forbids_commit:
            self._end(session, "ROLLED_BACK")
        elif session.failure is not None:
            raise Refused("RollbackOnlyError", session.failure)
        else:
            self._end(session, "COMMITTED")

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
        savepoint = session.set_savepoint()
        session.managers.append(savepoint)
        error = self._caught(body)
        assert savepoint is session.managers.pop()
        if error is None:
            session.release(savepoint)
        else:
            session.roll_back_to(savepoint)
            raise error

    def _begin_by_hand(self, body: Sequence[Statement]) -> None:
        session = self._session
        if session.has_begun and not session.is_durable:
            raise Refused("InvalidRequestError")
        session.check_usable()
        if session.is_durable:
            self._end(session, "COMMITTED")
        session.has_begun = session.is_by_hand = True
        [transaction] = session.levels
        session.managers.append(transaction)
        error = self._caught(body)
        assert transaction is session.managers.pop()
        if transaction.is_over:
            _surface(error)
        elif error is not None:
            self._end(session, "ROLLED_BACK", is_quiet=True)
            raise error
        elif transaction.is_broken:
            self._end(session, "ROLLED_BACK")
        else:
            self._commit_by_hand(session)

    def _commit_by_hand(self, session: Session) -> None:
        refusal: Refused | None = None
        if session.is_aborted:
            refusal = Refused("TransactionAbortedError")
        elif session.failure is not None:
            refusal = Refused("RollbackOnlyError", session.failure)
        elif session.forbids_commit:
            session.flush()
            if not session.is_open:
                session.end_unbegun()
                return
            refusal = Refused("RollbackOnlyError")
        if refusal is None:
            self._end(session, "COMMITTED")
        else:
            self._end(session, "ROLLED_BACK", is_quiet=True)
            raise refusal

    # ---------------------------------------------------------------- blocks

    def _own_scope(self, scope: Scope) -> None:
        with self._told(f"scope {scope.id}"):
            self._scope(scope.mode, scope.body)

    def _block(self, block: Block) -> None:
        with self._told(f"{block.propagation} {block.id}"):
            self._enter(block)

    def _enter(self, block: Block) -> None:
        session = self._sessions[-1] if self._sessions else None
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
        error = self._caught(block.body)
        if error is not None and rolls_back(error, block):
            session.failures.append(Failure(error, session.levels[-1]))
        _surface(error)

    def _nest(self, block: Block) -> None:
        session = self._session
        savepoint = session.set_savepoint()
        unit = Unit()
        session.units.append(unit)
        error = self._caught(block.body)
        session.units.remove(unit)
        is_to_be_undone = unit.is_rollback_only or rolls_back(error, block)
        if savepoint.is_over:  # with the whole transaction: it is like a joined block since then
            if error is not None and is_to_be_undone and session.is_open:
                session.failures.append(Failure(error, session.levels[-1]))
            elif is_to_be_undone and session.is_open:
                self._set_rollback_only()
            _surface(error)
            return
        failure = None if is_to_be_undone else session.failure_in(savepoint)
        if is_to_be_undone or failure is not None:
            session.roll_back_to(savepoint)
        elif savepoint.is_broken:
            session.roll_back_to(savepoint)
            raise Refused("PendingRollbackError")
        else:
            session.release(savepoint)
        _surface(error)
        if failure is not None:
            raise Refused("RollbackOnlyError", failure)

    def _begin(self, block: Block) -> None:
        """A transaction on a session that has none of ours: reads that are open there end."""
        session = self._session
        if session.is_the_users and (session.has_written or len(session.levels) > 1):
            raise Refused("ConfigurationError")
        self._end(session, "ROLLED_BACK" if session.forbids_commit else "COMMITTED")
        self._unit(session, block.body, block)

    def _scope(self, mode: Mode, body: Sequence[Statement], block: Block | None = None) -> None:
        with self._opened(mode) as session:
            if mode == "transaction":
                self._unit(session, body, block)
                return
            error = self._caught(body)
            if rolls_back(error, block):
                self._end(session, "ROLLED_BACK", is_quiet=True)
            else:
                self._end(session, "ROLLED_BACK" if session.is_the_users else "COMMITTED")
            _surface(error)

    def _unit(self, session: Session, body: Sequence[Statement], block: Block | None) -> None:
        unit = Unit()
        session.units.append(unit)
        error = self._caught(body)
        is_to_be_undone = session.forbids_commit or rolls_back(error, block)
        failure = None if is_to_be_undone else session.failure
        commits = not is_to_be_undone and failure is None
        if commits:
            session.flush()
        session.units.remove(unit)
        if error is None and failure is None:
            self._end(session, "COMMITTED" if commits else "ROLLED_BACK")
            return
        self._end(session, "COMMITTED" if commits else "ROLLED_BACK", is_quiet=True)
        _surface(error)
        raise Refused("RollbackOnlyError", failure)

    @contextmanager
    def _opened(self, mode: Mode) -> Iterator[Session]:
        session = Session(mode, self.committed, aborts=not self._has_single_writer)
        self._sessions.append(session)
        try:
            yield session
        finally:
            assert session is self._sessions.pop()
            for hook, became in session.later:
                self._call(hook, became)

    # ---------------------------------------------------------------- ends and hooks

    def _end(self, session: Session, outcome: Became, *, is_quiet: bool = False) -> None:
        """The transaction is over, and its hooks run; quietly while an error is under way.

        Raises:
            Exception: Why COMMIT was refused; else the first error of a hook that wants it seen.
        """
        hooks, refusal = session.end(outcome)
        error: BaseException | None = refusal
        due = [each for each in hooks if each[1] in RUNS_AFTER.get(each[0].on, {each[1]})]
        # Who waits for the response does so before the others run, and register more.
        self._end_of(session).extend(each for each in due if each[0].when == "after_response")
        for hook, became in due:
            if hook.when != "after_response":
                hook_error = self._call(hook, became)
                if hook.on_error == "raise" and not is_quiet:
                    error = error or hook_error
        _surface(error)

    def _end_of(self, session: Session) -> list[tuple[Hook, Became]]:
        """What waits for the end of the request, or else of the scope."""
        return (self._sessions[0] if self._is_request else session).later

    def _register(self, hook: Hook) -> None:
        session = self._sessions[-1] if self._sessions else None
        if session is not None and not session.is_durable:
            session.hooks.append(Waiting(hook, session.levels[-1]))
        elif hook.on == "rollback":
            return
        elif session is not None and hook.when == "after_response":
            self._end_of(session).append((hook, "NOT_BEGUN"))
        else:
            is_plain = hook.is_plain and not self._is_sync  # it can't wait for the end of a scope
            error = self._call(hook, "NOT_BEGUN", has_scope=not is_plain)
            if hook.on_error == "raise" and (is_plain or self._is_sync):
                _surface(error)

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


def _surface(error: BaseException | None) -> None:
    if error is not None:
        raise error


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
