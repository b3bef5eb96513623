"""What became of the requests, from the database alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, LiteralString

from bench.chaos import ledger
from bench.chaos.app import IN_DOUBT, OUTCOME

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bench.chaos.faults import Connection
    from bench.chaos.requests import Asked

KEPT = 50
"""How many requests of each finding are named in the results."""


@dataclass
class Findings:
    """The audit's counts.

    Attributes:
        requests: That were to write, and were answered or given up.

        statuses: Of them, by status; 0 is none.

        missing: Acknowledged, and not there.

        present: Answered with an error that claims to know, and there.

        in_doubt: Said to be in doubt: how many were committed, how many rolled back.

        halves: Transfers, bodies and balances of which only a part is there.

        named: The requests behind `missing`, `present` and `halves`.

        unanswered: No head came: how many were committed, how many rolled back.
    """

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    present: Counter[str] = field(default_factory=Counter)
    in_doubt: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    halves: Counter[str] = field(default_factory=Counter)
    hung: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def acknowledged(self) -> int:
        """How many got a success."""
        return sum(count for status, count in self.statuses.items() if 0 < status < 400)  # noqa: PLR2004

    def name(self, finding: str, what: object) -> None:
        """Keep what a count stands for."""
        kept = self.named.setdefault(finding, [])
        if len(kept) < KEPT:
            kept.append(what)


async def audit(
    connection: Connection, asked: Iterable[Asked], doubted: set[int], findings: Findings
) -> None:
    """Compare what clients were told with what is there; nothing is under way any more.

    *doubted* are the requests that the app's log says are in doubt: a server that ends answers a
    request that it cancels by itself.
    """
    requests = list(asked)
    ids = [each.id for each in requests]
    present = await _counts(connection, "SELECT id, 1 FROM transfer WHERE id = ANY(%s)", ids)
    pages = await _counts(
        connection,
        "SELECT transfer_id, count(*) FROM page WHERE transfer_id = ANY(%s) GROUP BY 1",
        ids,
    )
    for each in requests:
        is_doubted = each.id in doubted
        judge(each, each.id in present, pages.get(each.id, 0), findings, is_doubted=is_doubted)
    await _find_halves(connection, ids, findings)


async def _counts(connection: Connection, query: LiteralString, ids: list[int]) -> dict[int, int]:
    found = await connection.execute(query, [ids])
    return {row[0]: row[1] for row in await found.fetchall()}


def judge(
    each: Asked, is_present: bool, pages: int, findings: Findings, *, is_doubted: bool = False
) -> None:
    """Compare what a client was told with what is there."""
    answer = each.answer
    became = "committed" if is_present else "rolled back"
    findings.requests += 1
    findings.statuses[answer.status] += 1
    findings.hung[each.kind] += answer.is_hung
    what = {
        "id": each.id,
        "kind": each.kind,
        "status": answer.status,
        "body": answer.body[:200].decode(errors="replace"),
        "pages": pages,
    }
    if answer.status == 0:
        findings.unanswered[became] += 1
    elif answer.status >= 400 and (is_doubted or answer.headers.get(OUTCOME) == IN_DOUBT):  # noqa: PLR2004 - an error
        findings.in_doubt[became] += 1
        findings.name("in doubt", {**what, "became": became})
    elif answer.status < 400:  # noqa: PLR2004 - a success
        if not is_present or (answer.is_complete and pages < each.pages):
            findings.missing[each.kind] += 1
            findings.name("missing", what)
    elif is_present:
        findings.present[each.kind] += 1
        findings.name("present", what)
    if pages not in {0, each.pages}:
        findings.halves["body"] += 1
        findings.name("halves", what)


async def _find_halves(connection: Connection, ids: list[int], findings: Findings) -> None:
    halves = await connection.execute(
        "SELECT transfer.id FROM transfer LEFT JOIN entry ON entry.transfer_id = transfer.id "
        "WHERE transfer.id = ANY(%s) GROUP BY transfer.id "
        "HAVING count(entry.id) <> 2 OR sum(entry.amount) <> 0",
        [ids],
    )
    for row in await halves.fetchall():
        findings.halves["transfer"] += 1
        findings.name("halves", {"id": row[0]})
    balances = await connection.execute(
        "SELECT account.id FROM account LEFT JOIN entry ON entry.account_id = account.id "
        "GROUP BY account.id HAVING account.balance <> %s + coalesce(sum(entry.amount), 0)",
        [ledger.OPENING_BALANCE],
    )
    # Of the whole ledger, every time: a balance that is wrong stays so.
    findings.halves["balance"] = len(await balances.fetchall())
