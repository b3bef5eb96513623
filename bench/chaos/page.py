"""Writes what the runs came to into `docs/reliability.md`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.chaos.faults import MEANINGS
from bench.chaos.logs import CROWD
from bench.chaos.report import COLUMNS, table
from bench.chaos.requests import KINDS
from bench.chaos.rows import ROWS, Row

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "build" / "chaos"
"""One file for each row."""

_CAUSES = {
    "an SQL error that the app caught": {"swallowed"},
    "COMMIT refused": {"commit refused"},
    "streams": {"statement", "left after head", "left in body"},
}
_OTHER_CAUSES = "connection lost, and the rest"

BLOCKS = ("table", "answers", "missing", "requests", "faults", "versions", "commands")

Found = dict[str, Any]


def write() -> None:
    """Replace the page's blocks by what is in `RESULTS`; rows that haven't run are left out."""
    read_rows = [(each, read(each)) for each in ROWS]
    ran = [(each, results) for each, results in read_rows if results is not None]
    text = PAGE.read_text()
    for name, block in zip(BLOCKS, blocks(ran), strict=True):
        begin, end = marks(name)
        pattern = re.compile(f"(?<={re.escape(begin)}\n).*?(?=\n{re.escape(end)})", re.DOTALL)
        found = pattern.search(text)
        assert found is not None, name
        text = f"{text[: found.start()]}\n{block}\n{text[found.end() :]}"
    PAGE.write_text(text)


def marks(name: str) -> tuple[str, str]:
    """What stands around a block of the page."""
    return f"<!-- chaos: {name} -->", f"<!-- chaos: end of {name} -->"


def read(row: Row) -> Found | None:
    """What a row came to, if it has run."""
    file = RESULTS / f"{row.name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def blocks(ran: list[tuple[Row, Found]]) -> list[str]:
    """What is in each of `BLOCKS`; the first row is told in full."""
    _, first = ran[0]
    return [
        table(COLUMNS, [_cells(row, found) for row, found in ran]),
        _answers(first),
        _missing([(row, found) for row, found in ran if not row.is_ours]),
        _requests(first),
        _faults(first),
        _versions(ran),
        _commands(ran),
    ]


def _cells(row: Row, found: Found) -> list[str]:
    cells = [row.label, *found["row"][1:]]
    in_doubt = COLUMNS.index("in doubt: committed, rolled back")
    if not row.is_ours:  # they have no such answer
        cells[in_doubt] = "-"
    return cells


def _answers(found: Found) -> str:
    findings = found["findings"]
    unanswered = findings["unanswered"]
    committed, rolled_back = unanswered.get("committed", 0), unanswered.get("rolled back", 0)
    named = findings["named"].get("in doubt", [])
    became = [each["became"] for each in named]
    return (
        f"Of all requests of the first row that write, {findings['statuses'].get('503', 0):,} got "
        "a 503, most because 200 clients wanted a pool of 2, and "
        f"{committed + rolled_back:,} no answer: of these {committed:,} are committed, "
        f"{rolled_back:,} are not, and no client was told otherwise. The app called "
        f"{len(named):,} in doubt, to a client or in its log: {became.count('committed'):,} were "
        f"committed, {became.count('rolled back'):,} were not; the results name each."
    )


def _missing(ran: list[tuple[Row, Found]]) -> str:
    rows = []
    for row, found in ran:
        missing: dict[str, int] = found["findings"]["missing"]
        counts = [sum(missing.get(kind, 0) for kind in kinds) for kinds in _CAUSES.values()]
        counts.append(sum(missing.values()) - sum(counts))
        rows.append([row.label, *(f"{count:,}" for count in counts)])
    return table(["", *_CAUSES, _OTHER_CAUSES], rows)


def _requests(found: Found) -> str:
    rows = [
        [f"*{name}*", kind.means, _count(found["kinds"], name), _count(found["struck"], name)]
        for name, kind in KINDS.items()
    ]
    return table(["request", "what it is", "sent", "came to that"], rows)


def _faults(found: Found) -> str:
    struck = {**found["faults"], CROWD: found["struck"].get(CROWD, 0)}
    rows = [[f"*{name}*", means, _count(struck, name)] for name, means in MEANINGS.items()]
    return table(["fault", "what it is", "struck"], rows)


def _count(counts: dict[str, int], name: str) -> str:
    return f"{counts.get(name, 0):,}"


def _versions(ran: list[tuple[Row, Found]]) -> str:
    told = []
    for name in ran[0][1]["versions"]:
        labels: dict[str, list[str]] = {}
        for row, found in ran:
            labels.setdefault(found["versions"].get(name, "unknown"), []).append(row.label)
        usual = max(labels, key=lambda version: len(labels[version]))
        others = [
            f"{version} for {', '.join(of)}" for version, of in labels.items() if version != usual
        ]
        told.append(f"{name} {usual}" + (f" ({'; '.join(others)})" if others else ""))
    return f"All on {', '.join(told)}."


def _commands(ran: list[tuple[Row, Found]]) -> str:
    commands = [row.command(found["minutes"], found["seed"]) for row, found in ran]
    return "\n".join(["```sh", *commands, "```"])
