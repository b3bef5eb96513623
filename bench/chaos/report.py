"""What a run came to: as JSON, and as a row of the table that the documentation shows."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from bench.chaos.audit import LOST_AND_LOGGED, LOST_WITH_THE_PROCESS, WRITTEN, WRONG
from bench.chaos.logs import AS_IN_DOUBT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.chaos.results import Results

COLUMNS = (
    "",
    "minutes",
    "requests that write",
    "faults and faulty requests",
    "acknowledged",
    "of these missing",
    "error, yet present",
    "in doubt: committed, rolled back",
    "halves",
    "receipts: written; lost, and logged; wrong",
    "left: connections, transactions, tasks",
    "next 100 failed",
)


def row(results: Results) -> list[str]:
    """The results in the order of `COLUMNS`."""
    findings, left = results.findings, results.left
    log = results.log
    lost = findings.receipts[LOST_AND_LOGGED] + findings.receipts[LOST_WITH_THE_PROCESS]
    leaks = (
        left["checked out"] + log["connections collected"],
        left["idle in transaction"],
        left["tasks"] + log["tasks destroyed"],
    )
    return [
        f"{results.contestant}, {results.driver}",
        f"{results.seconds / 60:.0f}",
        f"{findings.requests:,}",
        f"{results.faulty:,}",
        f"{findings.acknowledged:,}",
        f"{findings.missing.total():,}",
        f"{findings.present.total():,}",
        f"{findings.in_doubt['committed']:,}, {findings.in_doubt['rolled back']:,}",
        f"{findings.halves.total() + results.wrong_sums:,}",
        f"{findings.receipts[WRITTEN]:,}; {lost:,}; {findings.wrong_receipts:,}",
        ", ".join(f"{count:,}" for count in leaks),
        f"{results.next_failed:,} of {results.next_tried:,}",
    ]


def table(columns: Sequence[str], rows: Iterable[list[str]]) -> str:
    """A markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def violations(results: Results) -> list[str]:
    """What the audit found that must not be."""
    findings, left = results.findings, results.left
    found = {
        "acknowledged and missing": findings.missing.total(),
        "answered with an error, and present": findings.present.total(),
        "halves": findings.halves.total(),
        "sums that can't be": results.wrong_sums,
        **{f"receipts {what}": findings.receipts[what] for what in WRONG},
        "requests without an end": findings.hung.total(),
        "of the next requests failed": results.next_failed,
        **{f"left: {name}": count for name, count in left.items()},
        **{name: count for name, count in results.log.items() if name != AS_IN_DOUBT},
    }
    return [f"{name}: {count}" for name, count in found.items() if count]


def as_json(results: Results, *, minutes: float, seed: int) -> dict[str, Any]:
    """Everything, with where it was measured; *minutes* are those that it was to take."""
    return {
        **vars(results),
        "findings": vars(results.findings),
        "faulty": results.faulty,
        "violations": violations(results),
        "row": row(results),
        "minutes": minutes,
        "seed": seed,
        "machine": {"python": platform.python_version(), "system": platform.platform()},
    }
