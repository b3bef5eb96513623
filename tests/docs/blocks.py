"""The code blocks of README and docs, and which test runs which."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
]

FENCE = re.compile(
    r"(?:<!-- (?:example: (?P<name>[\w-]+)|not run: (?P<why_not>[^>]+)) -->\n)?"
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

F = TypeVar("F", bound=Callable[..., Any])

Block = tuple[str, str]
"""A page's name, and the name in the comment above the block."""

shown: set[Block] = set()
"""The blocks that some test runs."""


@dataclass(frozen=True)
class Source:
    """A code block, and where it stands.

    Attributes:
        name: As the comment above it says; empty without one.

        line: The number of its first line of code.

        why_not: Why no test can run it, as the comment above it says; empty for all others.
    """

    page: Path
    name: str
    language: str
    code: str
    line: int
    why_not: str


def name_of(page: Path) -> str:
    """What tests call a page: its path below `docs`."""
    return page.relative_to(DOCS).as_posix() if page.is_relative_to(DOCS) else page.name


def blocks_of(page: Path) -> list[Source]:
    """The code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Source(
            page,
            found["name"] or "",
            found["language"],
            found["code"],
            text.count("\n", 0, found.start("code")) + 1,
            found["why_not"] or "",
        )
        for found in FENCE.finditer(text)
    ]


def find_block(page: str, name: str) -> Source:
    """The block of this name."""
    (path,) = (path for path in PAGES if name_of(path) == page)
    found = [block for block in blocks_of(path) if block.name == name]
    assert 1 == len(found), f"{page} has {len(found)} examples named {name!r}"
    return found[0]


def runs(page: str, *names: str) -> Callable[[F], F]:
    """Say which blocks of a page a test's `example` consists of, in order.

    A name with a page before it (`tutorial.md/tables`) is taken from there.
    """
    blocks = [(other or page, name) for other, _, name in (each.rpartition("/") for each in names)]
    shown.update(blocks)

    def decorate(test: F) -> F:
        test.blocks = blocks  # type: ignore[attr-defined]
        return test

    return decorate
