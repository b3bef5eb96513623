"""Programs of transactional blocks: what they are made of, and random ones.

A program is a tree of plain dataclasses, so that one that fails is read as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal

from hypothesis import strategies as st

Mode = Literal["transaction", "autocommit", "manual"]
MODES: tuple[Mode, ...] = ("transaction", "autocommit", "manual")

PROPAGATIONS = (
    *("REQUIRED", "REQUIRES_NEW", "NESTED", "SUPPORTS"),
    *("NOT_SUPPORTED", "MANDATORY", "NEVER"),
)


class Oops(Exception):  # noqa: N818 - what programs raise, not what the package does
    """What a program raises; its number says where."""


class Mild(Oops):
    """A kind of it."""


class Mildest(Mild):
    """A kind of that."""


class Stop(BaseException):
    """What no `except Exception` catches, and no rule lets commit."""


ERRORS: dict[str, type[BaseException]] = {
    each.__name__: each for each in (Oops, Mild, Mildest, Stop)
}
RULED: dict[str, type[Exception]] = {
    each.__name__: each for each in (Exception, Oops, Mild, Mildest)
}
"""What a block's rules may name."""


# --------------------------------------------------------------------------------------
# Statements
# --------------------------------------------------------------------------------------


class Part:
    """Something that programs are made of; its `repr` leaves out what is as usual."""

    def __repr__(self) -> str:
        told = [
            f"{each.name}={getattr(self, each.name)!r}"
            for each in fields(self)  # type: ignore[arg-type]
            if getattr(self, each.name) != each.default
        ]
        return f"{type(self).__name__}({', '.join(told)})"


@dataclass(frozen=True, repr=False)
class Write(Part):
    """`INSERT` of a row that nobody else inserts."""

    id: int = 0


@dataclass(frozen=True, repr=False)
class Add(Part):
    """`session.add()` of such a row: the next flush inserts it."""

    id: int = 0


@dataclass(frozen=True, repr=False)
class Orphan(Part):
    """`INSERT` of what only COMMIT refuses."""

    id: int = 0


@dataclass(frozen=True, repr=False)
class Fail(Part):
    """A query that the database refuses, and that ends all work in PostgreSQL's transaction."""


@dataclass(frozen=True, repr=False)
class FailFlush(Part):
    """A flush that the database refuses: SQLAlchemy rolls back at once what it was in."""

    id: int = 0


@dataclass(frozen=True, repr=False)
class Read(Part):
    """`SELECT` of every row of the program."""


@dataclass(frozen=True, repr=False)
class Commit(Part):
    """`session.commit()` in mid-way."""

    id: int = 0


@dataclass(frozen=True, repr=False)
class Release(Part):
    """`db.release()`."""

    id: int = 0


@dataclass(frozen=True, repr=False)
class Rollback(Part):
    """`session.rollback()` in mid-way."""


@dataclass(frozen=True, repr=False)
class SetRollbackOnly(Part):
    """`db.set_rollback_only()`."""


@dataclass(frozen=True, repr=False)
class Raise(Part):
    """An exception."""

    error: str
    id: int = 0


@dataclass(frozen=True, repr=False)
class Hook(Part):
    """`db.on_commit()` and the like; *body* is what the hook does when it is called."""

    on: Literal["commit", "rollback", "completion"]
    body: tuple[Statement, ...] = ()
    when: Literal["before_response", "after_response"] = "before_response"
    on_error: Literal["log", "raise"] = "log"
    is_plain: bool = False
    id: int = 0


@dataclass(frozen=True, repr=False)
class Swallow(Part):
    """`try: ... except Exception: pass`."""

    body: tuple[Statement, ...]


@dataclass(frozen=True, repr=False)
class Savepoint(Part):
    """The user's own `async with session.begin_nested()`."""

    body: tuple[Statement, ...]


@dataclass(frozen=True, repr=False)
class Begin(Part):
    """The user's own `async with session.begin()`."""

    body: tuple[Statement, ...]


@dataclass(frozen=True, repr=False)
class Block(Part):
    """A transactional block: around *body*, or as the decorator of a function that does it."""

    propagation: str
    body: tuple[Statement, ...]
    rollback_for: tuple[str, ...] = ()
    no_rollback_for: tuple[str, ...] = ()
    is_decorator: bool = False
    id: int = 0


@dataclass(frozen=True, repr=False)
class Scope(Part):
    """`async with db.session_scope(mode=...)`."""

    mode: Mode
    body: tuple[Statement, ...]
    id: int = 0


Statement = (
    Write
    | Add
    | Orphan
    | Fail
    | FailFlush
    | Read
    | Commit
    | Release
    | Rollback
    | SetRollbackOnly
    | Raise
    | Hook
    | Swallow
    | Savepoint
    | Begin
    | Block
    | Scope
)


# --------------------------------------------------------------------------------------
# Programs
# --------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Job(Part):
    """A program outside of any request, in a scope or in none."""

    mode: Mode | None
    body: tuple[Statement, ...]


@dataclass(frozen=True, repr=False)
class Request(Part):
    """A program as an endpoint: it answers with *status*, and goes on after the response.

    Attributes:
        is_handled: Whether it answers from inside an `except` block, as a framework does.

        background: What it does after the response.
    """

    mode: Mode
    body: tuple[Statement, ...]
    status: int = 200
    is_handled: bool = False
    background: tuple[Statement, ...] = ()


Program = Job | Request


def numbered(program: Any, first: int = 1) -> Any:
    """*program* with a number for each part that has one, in the order of reading."""
    following = iter(range(first, 10_000))

    def number(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(number(each) for each in part)
        if not is_dataclass(part) or isinstance(part, type):
            return part
        names = [each.name for each in fields(part)]
        if "id" in names:
            part = replace(part, id=next(following))
        return replace(part, **{name: number(getattr(part, name)) for name in names})

    return number(program)


# --------------------------------------------------------------------------------------
# Random ones
# --------------------------------------------------------------------------------------


def _often(common: Any, *rare: Any, times: int = 6) -> st.SearchStrategy[Any]:
    return st.sampled_from([common] * times + list(rare))


def _weighted(*weighted: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """One of some strategies, the first one where a failure is made smaller."""
    each = [strategy for weight, strategy in weighted for _ in range(weight)]
    return st.sampled_from(each).flatmap(lambda chosen: chosen)


def _raises(*, stops: bool) -> st.SearchStrategy[Raise]:
    names = ["Oops", "Oops", "Mild", "Mildest", *(["Stop"] if stops else [])]
    return st.builds(Raise, st.sampled_from(names))


def _bodies(of: st.SearchStrategy[Statement], least: int = 0, most: int = 4) -> Any:
    return st.lists(of, min_size=least, max_size=most).map(tuple)


_modes = _often("transaction", "autocommit", "manual", times=3)
_ons = st.sampled_from(["commit", "rollback", "completion"])
_whens = _often("before_response", "after_response")
_on_errors = _often("log", "raise", times=4)


@cache
def _hooks(depth: int) -> st.SearchStrategy[Hook]:
    """Hooks, plain functions and coroutine functions."""
    raises = _raises(stops=False)
    plain: list[tuple[int, st.SearchStrategy[Any]]] = [(1, raises)]
    full: list[tuple[int, st.SearchStrategy[Any]]] = [(2, st.builds(Write)), (1, raises)]
    full += [(1, st.builds(each)) for each in (Add, Orphan, Fail, FailFlush)]
    full.append((1, st.builds(Read)))
    full.append((1, st.builds(SetRollbackOnly)))
    if depth > 0:
        plain.append((1, _hooks(0)))
        full.append((1, _hooks(depth - 1)))
        blocks = st.builds(Block, st.sampled_from(PROPAGATIONS), _bodies(st.builds(Write), 0, 1))
        full.append((1, blocks))
    return st.builds(
        lambda on, body, when, on_error: Hook(on, body[1], when, on_error, body[0]),
        _ons,
        st.one_of(
            st.tuples(st.just(value=False), _bodies(_weighted(*full), 0, 2)),
            st.tuples(st.just(value=True), _bodies(_weighted(*plain), 0, 1)),
        ),
        _whens,
        _on_errors,
    )


_rules = st.fixed_dictionaries(
    dict.fromkeys(RULED, _often(None, "rollback_for", "no_rollback_for", times=2))
).map(
    lambda drawn: (
        tuple(name for name, rule in drawn.items() if rule == "rollback_for"),
        tuple(name for name, rule in drawn.items() if rule == "no_rollback_for"),
    )
)
"""`rollback_for` and `no_rollback_for`."""


@cache
def statements(depth: int, *, has_scope: bool = True) -> st.SearchStrategy[Statement]:
    """Statements whose trees are *depth* high at most."""
    choices: list[tuple[int, st.SearchStrategy[Any]]] = [(3, _hooks(1)), (1, _raises(stops=True))]
    if has_scope:
        choices.insert(0, (3, st.builds(Write)))
        plain = (Add, Add, Read, Orphan, Fail, FailFlush)
        ends = (Commit, Rollback, Release, SetRollbackOnly)
        choices += [(1, st.builds(each)) for each in (*plain, *ends)]
    if depth:
        inside = _bodies(statements(depth - 1))
        blocks = st.builds(
            lambda propagation, body, rules, is_decorator: Block(
                propagation, body, rules[0], rules[1], is_decorator
            ),
            st.sampled_from(PROPAGATIONS + ("REQUIRED", "NESTED") * 2),
            inside,
            st.one_of(st.just(((), ())), _rules),
            st.booleans(),
        )
        around = _bodies(statements(depth - 1, has_scope=has_scope), 1)
        choices += [
            (4, blocks),
            (5, blocks.map(lambda block: Swallow((block,)))),
            (2, st.builds(Swallow, around)),
            (1, st.builds(Scope, st.sampled_from(MODES), inside)),
        ]
        if has_scope:
            choices += [(2, st.builds(Savepoint, inside)), (1, st.builds(Begin, inside))]
    return _weighted(*choices)


def jobs(depth: int = 4) -> st.SearchStrategy[Any]:
    """Jobs, in a scope of any mode or in none."""
    in_scope = st.builds(Job, _modes, _bodies(statements(depth), 1, 6))
    without = st.builds(Job, st.none(), _bodies(statements(depth, has_scope=False), 1, 6))
    return st.one_of(in_scope, without).map(numbered)


def requests(depth: int = 4) -> st.SearchStrategy[Any]:
    """Requests in any mode, with work after the response."""
    return st.builds(
        Request,
        _modes,
        _bodies(statements(depth), 1, 6),
        _often(200, 409, 500, times=2),
        _often(False, True),
        st.one_of(st.just(()), st.just(()), _bodies(statements(2))),
    ).map(numbered)


def programs(depth: int = 4) -> st.SearchStrategy[Any]:
    """Any of them."""
    return st.one_of(jobs(depth), requests(depth))
