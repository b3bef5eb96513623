"""What the documentation renders from the code: Markdown and SVG, made by plain functions.

Sphinx calls them through the directive in ``directives.py``; ``tests/docs`` calls them without it.
Each takes the directive's content (its lines) and returns Markdown.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import asgi_dbscope
from asgi_dbscope import ResponseHead, State, errors
from asgi_dbscope._lifecycle import TRANSITIONS, Event, Outcome
from asgi_dbscope._policy import (
    Cause,
    Ending,
    Mode,
    commit_on_success,
    commit_unless_error,
    decide_ending,
)
from asgi_dbscope._propagation import ENTRIES, Entry, Propagation, Situation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from enum import Enum

ROOT = Path(__file__).parents[2]


# --------------------------------------------------------------------------------------
# Markdown
# --------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(text: str) -> str:
    """Text set as code."""
    return f"`{text}`"


def read_table(markdown: str) -> list[list[str]]:
    """The cells of a Markdown table, its head first."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for position, line in enumerate(lines)
        if position != 1
    ]


def member_docs(cls: type[Enum]) -> dict[str, str]:
    """The docstring under each member of an enumeration."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node, following in zip(definition.body, definition.body[1:], strict=False):
        match node, following:
            case (
                ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split()).replace("``", "`")
            case _:
                pass
    return found


def members(cls: type[Enum]) -> str:
    """The members of an enumeration, and what each means."""
    docs = member_docs(cls)
    return table(
        [cls.__name__.lower(), "means"], ([code(each.name), docs[each.name]] for each in cls)
    )


# --------------------------------------------------------------------------------------
# The lifecycle
# --------------------------------------------------------------------------------------


def transitions(_content: Sequence[str] = ()) -> str:
    """The table of states and events; an empty cell is an illegal step."""
    rows = (
        [
            code(state.name),
            *(code(steps[event].name) if event in steps else "" for event in Event),
        ]
        for state, steps in TRANSITIONS.items()
    )
    return table(["state", *(code(event.name) for event in Event)], rows)


def states(_content: Sequence[str] = ()) -> str:
    """What each state means."""
    return members(State)


def events(_content: Sequence[str] = ()) -> str:
    """What each event means."""
    return members(Event)


def outcomes(_content: Sequence[str] = ()) -> str:
    """What each outcome means."""
    return members(Outcome)


HEADS = {
    "response head: 200": ResponseHead(200),
    "response head: 302": ResponseHead(302),
    "response head: 404, returned": ResponseHead(404),
    "response head: 404, raised": ResponseHead(404, raised=True),
    "response head: 500": ResponseHead(500),
}
"""Heads that stand for all of them in the tables."""

ENDING_WORDS = {Ending.COMMIT: "commit", Ending.ROLLBACK: "roll back"}


def endings(_content: Sequence[str] = ()) -> str:
    """The ending for every cause, by asking the function that decides it."""
    docs = member_docs(Cause)
    situations: list[tuple[State, Mode]] = [
        (State.ACTIVE, "transaction"),
        (State.ACTIVE, "manual"),
        (State.ROLLBACK_ONLY_ACTIVE, "transaction"),
    ]
    rows = []
    for cause in Cause:
        heads = HEADS if cause is Cause.HEAD else {docs[cause.name]: None}
        for words, head in heads.items():
            decided = (
                decide_ending(cause, state, mode=mode, head=head) for state, mode in situations
            )
            rows.append([code(cause.name), words, *(ENDING_WORDS[each] for each in decided)])
    return table(["cause", "what happened", "ending", "in mode `manual`", "rollback-only"], rows)


def policies(_content: Sequence[str] = ()) -> str:
    """What each commit policy of the package answers to a head."""
    presets = (commit_unless_error, commit_on_success)
    rows = (
        [words, *("commit" if preset(head) else "roll back" for preset in presets)]
        for words, head in HEADS.items()
    )
    return table(["", *(code(preset.__name__) for preset in presets)], rows)


# --------------------------------------------------------------------------------------
# Transactional blocks
# --------------------------------------------------------------------------------------

SITUATION_WORDS = {
    Situation.NO_SCOPE: "no session scope",
    Situation.NO_TRANSACTION: "a scope without a transaction",
    Situation.IN_TRANSACTION: "in a transaction",
}
"""The heads of the columns."""

ENTRY_WORDS = {
    Entry.JOIN: "joins",
    Entry.BEGIN: "begins on the same session",
    Entry.SAVEPOINT: "savepoint",
    Entry.NEW_SCOPE: "a scope of its own",
    Entry.AUTOCOMMIT_SCOPE: "an autocommit scope of its own",
    Entry.AS_IS: "runs as it is",
    Entry.REFUSE_WITHOUT: "`TransactionRequiredError`",
    Entry.REFUSE_WITHIN: "`TransactionForbiddenError`",
}
"""What a block does when it is entered."""


def propagation(_content: Sequence[str] = ()) -> str:
    """What a block does where it is entered, for each propagation."""
    docs = member_docs(Propagation)
    rows = (
        [
            f"{code(each.name)}: {docs[each.name]}",
            *(ENTRY_WORDS[ENTRIES[each][situation]] for situation in Situation),
        ]
        for each in Propagation
    )
    return table(["propagation", *SITUATION_WORDS.values()], rows)


def situations(_content: Sequence[str] = ()) -> str:
    """What the columns of the propagations mean."""
    docs = member_docs(Situation)
    return table(
        ["column", "means"], ([SITUATION_WORDS[each], docs[each.name]] for each in Situation)
    )


# --------------------------------------------------------------------------------------
# The state diagram
# --------------------------------------------------------------------------------------

BOX_WIDTH, BOX_HEIGHT = 210, 44
LINE_HEIGHT = 15

PLACES: dict[State, tuple[int, int]] = {
    State.IN_DOUBT: (130, 60),
    State.COMMITTING: (790, 60),
    State.IDLE: (470, 280),
    State.ACTIVE: (790, 220),
    State.CLOSED: (130, 470),
    State.ROLLBACK_ONLY_IDLE: (460, 415),
    State.ROLLBACK_ONLY_ACTIVE: (790, 470),
}
"""Where the middle of each state's box is."""


@dataclass(frozen=True)
class Arrow:
    """All steps from one state to another.

    Attributes:
        events: What leads there.
    """

    start: State
    end: State
    events: tuple[Event, ...]


def arrows() -> list[Arrow]:
    """What the diagram draws: the table's steps, those between the same two states together."""
    grouped: defaultdict[tuple[State, State], list[Event]] = defaultdict(list)
    for state, steps in TRANSITIONS.items():
        for event, following in steps.items():
            grouped[state, following].append(event)
    return [Arrow(*ends, tuple(events)) for ends, events in grouped.items()]


def diagram(_content: Sequence[str] = ()) -> str:
    """The transitions as a picture."""
    drawn = "\n".join([*map(_draw_arrow, arrows()), *map(_draw_box, State)])
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 540" role="img" '
        'class="state-diagram" aria-label="The states of a session scope, as in the table">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>\n'
        f"{drawn}\n</svg>"
    )


def _draw_box(state: State) -> str:
    x, y = PLACES[state]
    is_end = not TRANSITIONS[state]
    return (
        f'<g data-state="{state.name}"><rect x="{x - BOX_WIDTH // 2}" y="{y - BOX_HEIGHT // 2}" '
        f'width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" class="{"end" if is_end else "state"}"/>'
        f'<text x="{x}" y="{y + 5}" text-anchor="middle">{state.name}</text></g>'
    )


def _draw_arrow(arrow: Arrow) -> str:
    names = [event.name for event in arrow.events]
    if arrow.start is arrow.end:
        path, (x, y) = _loop(*PLACES[arrow.start])
    else:
        path, (x, y) = _curve(PLACES[arrow.start], PLACES[arrow.end])
    first = y - (len(names) - 1) * LINE_HEIGHT / 2 + 4
    labels = "".join(
        f'<tspan x="{x:.0f}" y="{first + position * LINE_HEIGHT:.0f}">{escape(name)}</tspan>'
        for position, name in enumerate(names)
    )
    return (
        f'<g class="arrow" data-start="{arrow.start.name}" data-end="{arrow.end.name}">'
        f'<path d="{path}" marker-end="url(#tip)"/><text text-anchor="middle">{labels}</text></g>'
    )


def _loop(x: float, y: float) -> tuple[str, tuple[float, float]]:
    """From a box back to itself, at its outer corner."""
    top = y - BOX_HEIGHT / 2 if y < 400 else y + BOX_HEIGHT / 2  # noqa: PLR2004 - the lower row
    out = top - 34 if y < 400 else top + 34  # noqa: PLR2004 - the lower row
    left, right = x + 30, x + 90
    path = f"M{left} {top:.0f}C{left} {out:.0f} {right} {out:.0f} {right} {top:.0f}"
    return path, (x - 20, (top + out) / 2)


def _curve(start: tuple[int, int], end: tuple[int, int]) -> tuple[str, tuple[float, float]]:
    """From box to box, bent a little to its right so that there and back don't meet."""
    (x1, y1), (x2, y2) = start, end
    dx, dy = x2 - x1, y2 - y1
    length = (dx * dx + dy * dy) ** 0.5
    bend = 0.09 * length
    middle = ((x1 + x2) / 2 - dy / length * bend, (y1 + y2) / 2 + dx / length * bend)
    from_x, from_y = _border(start, middle)
    to_x, to_y = _border(end, middle)
    path = f"M{from_x:.0f} {from_y:.0f}Q{middle[0]:.0f} {middle[1]:.0f} {to_x:.0f} {to_y:.0f}"
    # The middle of a quadratic curve.
    return path, (
        (from_x + 2 * middle[0] + to_x) / 4,
        (from_y + 2 * middle[1] + to_y) / 4,
    )


def _border(centre: tuple[int, int], towards: tuple[float, float]) -> tuple[float, float]:
    """Where the line from a box's centre leaves the box."""
    dx, dy = towards[0] - centre[0], towards[1] - centre[1]
    scale = min(
        (BOX_WIDTH / 2 + 2) / abs(dx) if dx else float("inf"),
        (BOX_HEIGHT / 2 + 2) / abs(dy) if dy else float("inf"),
    )
    return centre[0] + dx * scale, centre[1] + dy * scale


# --------------------------------------------------------------------------------------
# The guarantees and the tests that show them
# --------------------------------------------------------------------------------------

GuaranteeState = Literal["held", "partly", "not yet"]
STATES: tuple[GuaranteeState, ...] = ("held", "partly", "not yet")

NAMED = re.compile(r"(?P<names>G\d+(?:, G\d+)*): (?P<sentence>.+)", re.DOTALL)
"""How the docstring of a test begins that shows guarantees."""


@dataclass(frozen=True)
class Guarantee:
    """A row of the guarantees.

    Attributes:
        name: ``G1``.

        state: Whether it holds.

        promise: What it says, for users.
    """

    name: str
    state: str
    promise: str


@dataclass(frozen=True)
class ShownBy:
    """A test that shows a guarantee.

    Attributes:
        path: Its file, below the project's root.

        sentence: What its docstring says.
    """

    path: str
    name: str
    sentence: str


def read_guarantees(content: Sequence[str]) -> list[Guarantee]:
    """The rows, written as ``G1 | held | promise``; a line that is indented goes on."""
    text = re.sub(r"\n\s+", " ", "\n".join(content))
    rows = [line.split(" | ", 2) for line in text.splitlines() if line.strip()]
    return [Guarantee(*(cell.strip() for cell in row)) for row in rows]


def find_tests(root: Path = ROOT) -> dict[str, list[ShownBy]]:
    """By guarantee, the tests whose docstrings name it."""
    found: defaultdict[str, list[ShownBy]] = defaultdict(list)
    for path in sorted(root.glob("tests/**/test_*.py")):
        for function in _functions(ast.parse(path.read_text(encoding="utf-8"))):
            named = NAMED.match(ast.get_docstring(function) or "")
            if named is None or not function.name.startswith("test_"):
                continue
            sentence = " ".join(named["sentence"].split())
            test = ShownBy(path.relative_to(root).as_posix(), function.name, sentence)
            for name in named["names"].split(", "):
                found[name].append(test)
    return found


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def guarantees(content: Sequence[str], root: Path = ROOT) -> str:
    """The table of guarantees, with the files of the tests that show each."""
    tests = find_tests(root)
    rows = []
    for each in read_guarantees(content):
        counts = Counter(test.path for test in tests.get(each.name, ()))
        files = (
            f"{code(path.removeprefix('tests/'))} ({count})"
            for path, count in sorted(counts.items())
        )
        rows.append([f"**{each.name}**", each.promise, each.state, ", ".join(files)])
    return table(["", "promise", "state", "tests, how many in which file"], rows)


def shown_by(_content: Sequence[str] = (), root: Path = ROOT) -> str:
    """For each guarantee, what its tests say."""
    blocks = []
    for name, tests in sorted(find_tests(root).items(), key=lambda each: int(each[0][1:])):
        items = "".join(
            f"<li><code>{escape(test.path)}</code>: {_inline(test.sentence)}</li>" for test in tests
        )
        summary = f"{name}: {len(tests)} test{'s' * (len(tests) > 1)}"
        blocks.append(f"<details><summary>{summary}</summary><ul>{items}</ul></details>")
    return "\n".join(blocks)


def _inline(text: str) -> str:
    return re.sub(r"`+([^`]+)`+", r"<code>\1</code>", escape(text))


# --------------------------------------------------------------------------------------
# Errors and modules
# --------------------------------------------------------------------------------------


def error_classes() -> dict[str, type[Exception]]:
    """The errors of the package, in the order of their module."""
    return {
        name: cls
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.DBScopeError)
    }


def read_remedies(content: Sequence[str]) -> dict[str, str]:
    """The remedies, written as ``NoSessionScopeError: what to do``; an indented line goes on."""
    text = re.sub(r"\n\s+", " ", "\n".join(content))
    pairs = (line.split(": ", 1) for line in text.splitlines() if line.strip())
    return {name: remedy.strip() for name, remedy in pairs}


def error_list(content: Sequence[str]) -> str:
    """Every error: its docstring, and what to do."""
    remedies = read_remedies(content)
    parts = []
    for name, cls in error_classes().items():
        said = " ".join(inspect.cleandoc(cls.__doc__ or "").split()).replace("``", "`")
        said = re.sub(r":\w+:`\.?([^`]+)`", r"`\1`", said)
        bases = ", ".join(code(base.__name__) for base in cls.__bases__)
        parts.append(
            f"{{py:class}}`~asgi_dbscope.{name}` ({bases})\n"
            f": {said}\n\n  *What to do:* {remedies[name]}\n"
        )
    return "\n".join(parts)


def modules(_content: Sequence[str] = (), root: Path = ROOT) -> str:
    """The modules from top to bottom, as the import rules have them, each with its first line."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (
        contract["layers"]
        for contract in project["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    rows = []
    for layer in layers:
        for name in re.findall(r"\w+", layer):
            path = _source_of(name)
            if path is not None:
                said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                rows.append([code(name), said.splitlines()[0].replace("``", "`")])
    return table(["module", "what it is"], rows)


def _source_of(module: str) -> Path | None:
    package = Path(asgi_dbscope.__file__).parent
    candidates = (package / f"{module}.py", package / module / "__init__.py")
    return next((path for path in candidates if path.exists()), None)


RENDERERS: Mapping[str, Callable[[Sequence[str]], str]] = {
    "diagram": diagram,
    "endings": endings,
    "errors": error_list,
    "events": events,
    "guarantees": guarantees,
    "modules": modules,
    "outcomes": outcomes,
    "policies": policies,
    "propagation": propagation,
    "shown-by": shown_by,
    "situations": situations,
    "states": states,
    "transitions": transitions,
}
"""What the directive can render, by name."""
