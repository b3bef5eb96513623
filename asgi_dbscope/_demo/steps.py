"""The tour's steps: what is asked of an app, and what must be true of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True)
class Facts:
    """What was measured of one request.

    Attributes:
        status: What the client was told.

        is_complete: Whether the client got the body to its end.

        timeline: What happened, with milliseconds before (negative) or after the response head.

        rows: How many rows there are afterwards, in each table that has any.

        held: Connections out of the pool when the client had the head, and was about to read.

        left: Connections out of the pool when all was over.
    """

    status: int
    is_complete: bool
    timeline: list[tuple[str, float]]
    rows: dict[str, int]
    held: int
    left: int

    def has(self, *names: str) -> bool:
        """Whether *names* happened, in this order, with anything between them."""
        happened = iter([each for each, _ in self.timeline])
        return all(
            any(each == name or each.startswith(f"{name} ") for each in happened) for name in names
        )


Claim: TypeAlias = Callable[[Facts], bool]


@dataclass(frozen=True)
class Step:
    """One request of the tour.

    Attributes:
        guarantees: Which promises of the package it shows.

        title: What happens, in a few words.

        note: What there is to know about it.

        request: Method, path and JSON.

        claims: What must be true of it: in a few words, and asked of the facts.

        client: What it does when it has the head: ``"reads"``, ``"waits"`` before it reads, or
            waits and ``"leaves"``.
    """

    guarantees: str
    title: str
    note: str
    request: tuple[str, str, dict[str, Any] | None]
    claims: dict[str, Claim]
    client: Literal["reads", "waits", "leaves"] = "reads"


def judge(claims: dict[str, Claim], facts: Facts) -> dict[str, bool]:
    """Which of *claims* are true of *facts*."""
    return {text: claim(facts) for text, claim in claims.items()}


# --------------------------------------------------------------------------------------
# Claims
# --------------------------------------------------------------------------------------

TRANSFER = {"transfers": 1, "entries": 2}
"""The rows of a transfer."""


def answers(status: int) -> dict[str, Claim]:
    """The client is told *status*."""
    return {f"the client is told {status}": lambda facts: facts.status == status}


def leaves(**rows: int) -> dict[str, Claim]:
    """Just *rows* are there afterwards, and every connection is back."""
    return {
        f"{'rows there' if rows else 'no row left'}, no connection out": lambda facts: (
            facts.rows == rows and not facts.left
        ),
    }


def happens(text: str, *names: str) -> dict[str, Claim]:
    """These happen, in this order."""
    return {text: lambda facts: facts.has(*names)}


def never_happens(text: str, *names: str) -> dict[str, Claim]:
    """None of these happens."""
    return {text: lambda facts: not any(facts.has(name) for name in names)}


ROLLBACK_FIRST = {
    **happens("ROLLBACK before the head", "BEGIN", "ROLLBACK", "checkin", "head"),
    **never_happens("no COMMIT", "COMMIT"),
}

TRUTH: dict[str, Claim] = {
    "the client is told the truth": lambda facts: (
        (facts.status < 400) == (facts.rows == TRANSFER)  # noqa: PLR2004 - the HTTP class of errors
    ),
}

COMPLETE: dict[str, Claim] = {"the body is complete": lambda facts: facts.is_complete}
TORN: dict[str, Claim] = {"the body is torn": lambda facts: not facts.is_complete}

# --------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------


def _transfer(*, recipient: str = "bob", amount: int = 25, **more: str) -> dict[str, Any]:
    return {"sender": "alice", "recipient": recipient, "amount": amount, **more}


STEPS = [
    Step(
        "G5",
        "A request without the database",
        "The middleware is there, and does nothing.",
        ("GET", "/health", None),
        {
            **answers(200),
            **never_happens("no connection, no transaction", "checkout", "BEGIN"),
        },
    ),
    Step(
        "G1 G6",
        "A transfer",
        "When the client hears of it, it is in the database.",
        ("POST", "/transfers", _transfer()),
        {
            **answers(201),
            **happens("COMMIT answered before the head", "BEGIN", "COMMIT", "head"),
            **happens("connection back before the head", "checkout", "checkin", "head"),
            **leaves(**TRANSFER),
        },
    ),
    Step(
        "G2",
        "A COMMIT that fails",
        "Whether an account exists is a deferred foreign key: only COMMIT finds out.",
        ("POST", "/transfers", _transfer(recipient="nobody")),
        {
            **TRUTH,
            **answers(409),
            **happens("transaction over before the head", "error in COMMIT", "checkin", "head"),
            **leaves(),
        },
    ),
    Step(
        "G3",
        "HTTPException after rows were written",
        "There isn't enough money, which shows when the entries are there.",
        ("POST", "/transfers", _transfer(amount=1000)),
        {**answers(409), **ROLLBACK_FIRST, **leaves()},
    ),
    Step(
        "G3",
        "502 returned after rows were written",
        "The bank is down, and the app returns an error instead of raising one.",
        ("POST", "/transfers", _transfer(via="bank")),
        {**answers(502), **ROLLBACK_FIRST, **leaves()},
    ),
    Step(
        "G4",
        "A dry run",
        "set_rollback_only(), and the answer goes out; by hand it is session.rollback().",
        ("POST", "/transfers/preview", _transfer()),
        {**answers(200), **ROLLBACK_FIRST, **leaves()},
    ),
    Step(
        "G21",
        "An SQL error that the app swallowed",
        "SQLite undoes that statement alone. PostgreSQL aborts the transaction, and answers COMMIT "
        "with ROLLBACK; no driver raises.",
        ("POST", "/transfers", _transfer(label="rent")),
        {**TRUTH, "no connection out": lambda facts: not facts.left},
    ),
    Step(
        "G6",
        "16 MB for a client that takes its time",
        "The endpoint needs the database before the head, and not after it.",
        ("GET", "/archive", None),
        {
            **happens("connection back before the head", "checkout", "checkin", "head"),
            "no connection held meanwhile": lambda facts: not facts.held,
            **COMPLETE,
        },
        client="waits",
    ),
    Step(
        "G7",
        "A stream that writes as it goes",
        "A statement, and a row for each page that was read.",
        ("GET", "/statement", None),
        {
            **happens("COMMIT answered before the last byte", "first byte", "COMMIT", "last byte"),
            **COMPLETE,
            **leaves(pages=3),
        },
    ),
    Step(
        "G7",
        "A stream whose COMMIT fails",
        "Its reader doesn't exist: only COMMIT finds out, and the head is long gone.",
        ("GET", "/statement?reader=nobody", None),
        {
            **happens("COMMIT refused in mid-stream", "first byte", "error in COMMIT"),
            **TORN,
            **leaves(),
        },
    ),
    Step(
        "G7",
        "A stream that raises half-way",
        "There is no rate for that currency.",
        ("GET", "/statement?currency=XAU", None),
        {
            **happens("ROLLBACK in mid-stream", "first byte", "ROLLBACK"),
            **never_happens("no clean end", "last byte"),
            **TORN,
            **leaves(),
        },
    ),
    Step(
        "G7",
        "A client that leaves half-way",
        "It asks for 256 pages, and is gone before it has them.",
        ("GET", "/statement?pages=256", None),
        {
            "no COMMIT when it is gone": lambda facts: (
                facts.has("client gone") and not facts.has("first byte", "COMMIT")
            ),
            **leaves(),
        },
        client="leaves",
    ),
    Step(
        "G8",
        "A receipt in a background task",
        "The task uses the request's session, which gets a new transaction.",
        ("POST", "/transfers", _transfer(receipt="mail")),
        {
            **answers(201),
            **happens("transfer committed before the head", "COMMIT", "head"),
            **happens("receipt committed after the body", "last byte", "COMMIT"),
            **leaves(**TRANSFER, receipts=1),
        },
    ),
    Step(
        "G1 G8",
        "A background task that fails",
        "The receipt is lost; the transfer stays, as the client was told.",
        ("POST", "/transfers", _transfer(receipt="fax")),
        {
            **TRUTH,
            **happens("receipt rolled back after the body", "last byte", "ROLLBACK"),
            **leaves(**TRANSFER),
        },
    ),
]
