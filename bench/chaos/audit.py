"""What became of the requests, from the database alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, LiteralString

from bench.chaos import ledger
from bench.chaos.app import IN_DOUBT, OUTCOME

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from bench.chaos.faults import Connection
    from bench.chaos.requests import Asked

KEPT = 50
"""How many requests of each finding are named in the results; those in doubt are all."""

WRITTEN = "written"
LOST_AND_LOGGED = "lost, and logged"
LOST_IN_SILENCE = "lost in silence"
LOST_WITH_THE_PROCESS = "lost with the process"
OF_NO_TRANSFER = "of no transfer"
WRITTEN_TWICE = "written twice"
"""What became of receipts."""

WRONG = (OF_NO_TRANSFER, WRITTEN_TWICE, LOST_IN_SILENCE)
"""Of these, what must not be."""


@dataclass(frozen=True)
class Known:
    """What is known of a request beside the client's answer.

    Attributes:
        is_present: Whether its transfer is in the database.

        pages: How many pages of its body are.

        receipts: How many receipts are.

        is_in_doubt: Whether the app's log says that it is: a server that ends answers a request
            that it cancels by itself.

        has_failed: Whether the app's log has an error of it.

        was_killed: Whether the process may have been killed before it had ended.
    """

    is_present: bool
    pages: int = 0
    receipts: int = 0
    is_in_doubt: bool = False
    has_failed: bool = False
    was_killed: bool = False

    @property
    def became(self) -> str:
        """What became of its transfer."""
        return "committed" if self.is_present else "rolled back"


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

        receipts: What became of the work after the response.

        named: The requests behind them.

        unanswered: No head came: how many were committed, how many rolled back.
    """

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    present: Counter[str] = field(default_factory=Counter)
    in_doubt: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    halves: Counter[str] = field(default_factory=Counter)
    receipts: Counter[str] = field(default_factory=Counter)
    hung: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def acknowledged(self) -> int:
        """How many got a success."""
        return sum(count for status, count in self.statuses.items() if 0 < status < 400)  # noqa: PLR2004

    @property
    def wrong_receipts(self) -> int:
        """How many receipts are there that must not be, or are lost and nobody says so."""
        return sum(self.receipts[what] for what in WRONG)

    def name(self, finding: str, what: object) -> None:
        """Keep what a count stands for."""
        kept = self.named.setdefault(finding, [])
        if len(kept) < KEPT or finding == IN_DOUBT:
            kept.append(what)


async def audit(
    connection: Connection,
    asked: Iterable[Asked],
    findings: Findings,
    *,
    in_doubt: Collection[int],
    failed: Collection[int],
    killed: Collection[int],
) -> None:
    """Compare what clients were told with what is there; nothing is under way any more.

    The last three are the requests of which that `Known` is true.
    """
    requests = list(asked)
    ids = [each.id for each in requests]
    present = await _counts(connection, "SELECT id, 1 FROM transfer WHERE id = ANY(%s)", ids)
    pages = await _counts(
        connection,
        "SELECT transfer_id, count(*) FROM page WHERE transfer_id = ANY(%s) GROUP BY 1",
        ids,
    )
    receipts = await _counts(
        connection,
        "SELECT transfer_id, count(*) FROM receipt WHERE transfer_id = ANY(%s) GROUP BY 1",
        ids,
    )
    for each in requests:
        known = Known(
            is_present=each.id in present,
            pages=pages.get(each.id, 0),
            receipts=receipts.get(each.id, 0),
            is_in_doubt=each.id in in_doubt,
            has_failed=each.id in failed,
            was_killed=each.id in killed,
        )
        judge(each, known, findings)
    await _find_halves(connection, ids, findings)


async def _counts(connection: Connection, query: LiteralString, ids: list[int]) -> dict[int, int]:
    found = await connection.execute(query, [ids])
    return {row[0]: row[1] for row in await found.fetchall()}


def judge(each: Asked, known: Known, findings: Findings) -> None:
    """Compare what a client was told with what is there."""
    answer = each.answer
    findings.requests += 1
    findings.statuses[answer.status] += 1
    findings.hung[each.kind] += answer.is_hung
    what = {
        "id": each.id,
        "kind": each.kind,
        "status": answer.status,
        "body": answer.body[:200].decode(errors="replace"),
        "became": known.became,
        "pages": known.pages,
        "receipts": known.receipts,
    }
    is_in_doubt = known.is_in_doubt or answer.headers.get(OUTCOME) == IN_DOUBT
    if is_in_doubt:
        findings.name(IN_DOUBT, what)
    if answer.status == 0:
        findings.unanswered[known.became] += 1
    elif answer.status < 400:  # noqa: PLR2004 - a success
        if not known.is_present or (answer.is_complete and known.pages < each.pages):
            findings.missing[each.kind] += 1
            findings.name("missing", what)
    elif is_in_doubt:
        findings.in_doubt[known.became] += 1
    elif known.is_present:
        findings.present[each.kind] += 1
        findings.name("present", what)
    if known.pages not in {0, each.pages}:
        findings.halves["body"] += 1
        findings.name("halves", what)
    became = judge_receipt(each, known)
    if became is not None:
        findings.receipts[became] += 1
    if became not in {None, WRITTEN}:
        findings.name(f"receipts {became}", what)


def judge_receipt(each: Asked, known: Known) -> str | None:
    """What became of the work after a response; `None` where there was to be none.

    A receipt has a transaction of its own, which may fail; its client has the answer by then, so
    the log has to say it. A killed process takes with it what it had still to do.
    """
    if known.receipts and not known.is_present:
        return OF_NO_TRANSFER
    if known.receipts > 1:
        return WRITTEN_TWICE
    if known.receipts:
        return WRITTEN
    was_answered = 0 < each.answer.status < 400 and each.answer.is_complete  # noqa: PLR2004
    if not (each.has_receipt and known.is_present and was_answered):
        return None
    if known.has_failed:
        return LOST_AND_LOGGED
    return LOST_WITH_THE_PROCESS if known.was_killed else LOST_IN_SILENCE


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
