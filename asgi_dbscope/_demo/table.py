"""What the tour prints."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asgi_dbscope._demo.recorder import Exchange
    from asgi_dbscope._demo.steps import Facts
    from asgi_dbscope._demo.tour import Visit

WIDTH = 112
"""The most columns that a step takes: wider is only emptier."""

STYLES = {
    "checkout": "dim",
    "checkin": "dim",
    "COMMIT": "bold green",
    "ROLLBACK": "bold yellow",
    "error": "bold red",
    "raised": "red",
    "client": "red",
    "head": "bold cyan",
    "first": "cyan",
    "last": "cyan",
}
"""How a mark is shown, by its first word."""


class Printer:
    """Prints to a terminal with colours and lines, and to anything else in plain ASCII."""

    def __init__(self, names: Sequence[str], console: Console | None = None) -> None:
        self.names = names
        self.console = console or Console(highlight=False, soft_wrap=False)
        self.box = box.ROUNDED if self.console.is_terminal else box.ASCII2

    def print(self, text: str = "", style: str = "") -> None:
        """Print a line."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def print_step(self, number: int, visits: Sequence[Visit]) -> None:
        """Print what came of one step, a column for each app."""
        step = visits[0].step
        method, path, body = step.request
        self.print()
        self.print(f"{number}. {step.title}  [{step.guarantees}]", "bold")
        self.console.print(step.note, style="dim", markup=False)
        self.print(f"{method} {path} {json.dumps(body) if body else ''}".rstrip())
        width = min(self.console.width, WIDTH)
        table = Table("", *self.names, box=self.box, show_lines=True, width=width)
        table.columns[0].width = 8
        for column in table.columns[1:]:
            column.ratio = 1
        facts = [each.facts for each in visits]
        table.add_row("ms from\nthe head", *(_timeline(each.timeline) for each in facts))
        table.add_row("client", *map(_response, visits))
        table.add_row("rows", *map(_rows, facts))
        table.add_row("promised", *map(_verdicts, visits))
        self.console.print(table)

    def print_summary(self, visits: Sequence[Sequence[Visit]]) -> None:
        """Print one line for each step."""
        self.print()
        table = Table("", "", "guarantee", *self.names, box=self.box)
        for number, row in enumerate(visits, 1):
            step = row[0].step
            table.add_row(str(number), step.title, step.guarantees, *map(_verdict, row))
        kept = [sum(each.is_kept for each in column) for column in zip(*visits, strict=True)]
        table.add_section()
        table.add_row("", "", "", *(f"{count} of {len(visits)}" for count in kept))
        self.console.print(table)

    def print_exchange(self, name: str, exchange: Exchange) -> None:
        """Print one request that somebody made, on a line."""
        text = Text(f"{name}: {exchange.label}  ")
        for mark, at in exchange.timeline:
            text.append(f" {mark}", _style(mark)).append(f" {at:+.1f}", "dim")
        self.console.print(text, soft_wrap=True)


def _style(mark: str) -> str:
    return STYLES.get(mark.partition(" ")[0], "")


def _timeline(timeline: Sequence[tuple[str, float]]) -> Text:
    lines = [Text(f"{at:+8.1f}  ").append(mark, _style(mark)) for mark, at in timeline]
    return Text("\n").join(lines)


def _response(visit: Visit) -> Text:
    facts = visit.facts
    status = HTTPStatus(facts.status)
    text = Text(
        f"{status.value} {status.phrase}", "green" if status < HTTPStatus.BAD_REQUEST else "yellow"
    )
    if not facts.is_complete:
        text.append(", body torn", "red")
    if visit.step.client == "waits":
        text.append(f", {facts.held} held while it waits", "red" if facts.held else "green")
    return text


def _rows(facts: Facts) -> str:
    return ", ".join(f"{name} {count}" for name, count in facts.rows.items()) or "none"


def _verdicts(visit: Visit) -> Text:
    lines = [
        Text("yes  " if is_true else "NO   ", "green" if is_true else "bold red").append(text, "")
        for text, is_true in visit.verdicts.items()
    ]
    return Text("\n").join(lines)


def _verdict(visit: Visit) -> Text:
    return Text("kept", "green") if visit.is_kept else Text("NOT KEPT", "bold red")
