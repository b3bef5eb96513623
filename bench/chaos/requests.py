"""What clients ask for: kinds of requests, most of them with a fault of their own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.chaos import ledger
from bench.chaos.client import Answer, Client

if TYPE_CHECKING:
    import itertools
    import random

NOBODY = -1
"""An account that isn't there: only COMMIT finds out."""

PAGES = 4


@dataclass(frozen=True)
class Asked:
    """A request that writes, and what its client knows of it.

    Attributes:
        id: Its own.

        kind: Which of `KINDS`.

        answer: What came back.

        pages: How many pages its body writes; 0 if it is no stream.

        has_receipt: Whether a receipt is written after the response.
    """

    id: int
    kind: str
    answer: Answer
    pages: int = 0
    has_receipt: bool = False


@dataclass
class Visitors:
    """The clients of one server's life, and all they were told.

    Attributes:
        port: Of the server.

        chance: What they do by.

        ids: Of their requests.

        asked: Their requests that are answered or given up.

        counts: How many of each kind.

        struck: How many of them were what their kind says, as far as a client can tell.

        wrong_sums: Balances that a read found, and that can't be.
    """

    port: int
    chance: random.Random
    ids: itertools.count[int]
    asked: list[Asked] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    wrong_sums: list[int] = field(default_factory=list)
    is_over: bool = False

    async def visit(self) -> None:
        """One client: a request after the other, until it is over."""
        clients = Client(self.port), Client(self.port)
        names = list(KINDS)
        weights = [KINDS[name].weight for name in names]
        try:
            while not self.is_over:
                [name] = self.chance.choices(names, weights)
                was_answered = await KINDS[name].run(self, name, clients)
                if not was_answered:  # the server may be restarting
                    await asyncio.sleep(0.05)
        finally:
            for client in clients:
                client.leave()

    async def transfer(
        self, kind: str, client: Client, options: dict[str, Any], **how: Any
    ) -> Answer:
        """Ask for a transfer, and keep what came of it."""
        content = {"id": next(self.ids), **self._accounts(), **options}
        answer = await client.request("POST", f"/transfers/{content['id']}", content, **how)
        self._note(
            Asked(content["id"], kind, answer, has_receipt=content.get("has_receipt", False))
        )
        return answer

    async def statement(self, kind: str, client: Client, **how: Any) -> Answer:
        """Ask for a stream, and keep what came of it."""
        content = {"id": next(self.ids), **self._accounts()}
        path = f"/statements/{content['id']}?pages={PAGES}"
        answer = await client.request("POST", path, content, **how)
        self._note(Asked(content["id"], kind, answer, PAGES))
        return answer

    async def read(self, kind: str, client: Client) -> Answer:
        """Read the sum of all balances, which never changes."""
        answer = await client.request("GET", "/balance")
        self.counts[kind] += answer.was_sent
        self.struck[kind] += _succeeded(answer)
        if _succeeded(answer):
            found = int(answer.body)
            if found != ledger.ACCOUNTS * ledger.OPENING_BALANCE:
                self.wrong_sums.append(found)
        return answer

    def _note(self, asked: Asked) -> None:
        if asked.answer.was_sent:
            self.asked.append(asked)
            self.counts[asked.kind] += 1
            self.struck[asked.kind] += KINDS[asked.kind].has_struck(asked.answer)

    def _accounts(self) -> dict[str, int]:
        sender, recipient = self.chance.sample(range(ledger.ACCOUNTS), 2)
        return {"sender": sender, "recipient": recipient}


Clients = tuple[Client, Client]
Run = Callable[[Visitors, str, Clients], Awaitable[bool]]


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    Attributes:
        run: What a client does; whether it got an answer, or didn't wait for one.

        weight: How often, beside the others.

        means: In a line.

        has_struck: Whether the answer shows that it was what it means to be.

        logged: What a log says where it was; the app's or PostgreSQL's.

        is_faulty: Whether the request is a fault by itself.
    """

    run: Run
    weight: int
    means: str
    has_struck: Callable[[Answer], bool] = lambda _: False
    logged: str = ""
    is_faulty: bool = True


def _transfer(**options: Any) -> Run:
    async def run(visitors: Visitors, kind: str, clients: Clients) -> bool:
        return (await visitors.transfer(kind, clients[0], options)).status != 0

    return run


def _leaving_transfer(leaves: str, seconds: float, **options: Any) -> Run:
    async def run(visitors: Visitors, kind: str, clients: Clients) -> bool:
        after = visitors.chance.uniform(0.0, seconds)
        how = {"leaves": leaves, "after": after}
        return (await visitors.transfer(kind, clients[0], options, **how)).was_sent

    return run


def _statement(leaves: str = "never", seconds: float = 0.0) -> Run:
    async def run(visitors: Visitors, kind: str, clients: Clients) -> bool:
        after = visitors.chance.uniform(0.0, seconds)
        answer = await visitors.statement(kind, clients[0], leaves=leaves, after=after)
        return answer.status != 0

    return run


def _pair(*, crosswise: bool, **options: Any) -> Run:
    """Two transfers at the same time that are in each other's way."""

    async def run(visitors: Visitors, kind: str, clients: Clients) -> bool:
        one, other = visitors.chance.sample(range(ledger.ACCOUNTS), 2)
        ways = [(one, other), (other, one) if crosswise else (one, other)]
        answers = await asyncio.gather(
            *(
                visitors.transfer(
                    kind, client, {"sender": way[0], "recipient": way[1], "pause": 0.02, **options}
                )
                for client, way in zip(clients, ways, strict=True)
            )
        )
        return all(answer.status for answer in answers)

    return run


async def _read(visitors: Visitors, kind: str, clients: Clients) -> bool:
    return (await visitors.read(kind, clients[0])).status != 0


def _succeeded(answer: Answer) -> bool:
    return 0 < answer.status < 400 and answer.is_complete  # noqa: PLR2004


def _left(answer: Answer) -> bool:
    return answer.has_left


KINDS: dict[str, Kind] = {
    "transfer": Kind(_transfer(), 14, "a transfer, as it should be", _succeeded, is_faulty=False),
    "receipt": Kind(
        _transfer(has_receipt=True),
        6,
        "a transfer with work after the response",
        _succeeded,
        is_faulty=False,
    ),
    "statement": Kind(
        _statement(), 6, "a stream that writes while it goes out", _succeeded, is_faulty=False
    ),
    "read": Kind(
        _read, 4, "a read of all balances, whose sum never changes", _succeeded, is_faulty=False
    ),
    "commit refused": Kind(
        _transfer(recipient=NOBODY, has_receipt=True),
        8,
        "a deferred foreign key without its row: only COMMIT fails",
        logged="ERROR: .* violates foreign key constraint",
    ),
    "refused": Kind(
        _transfer(then="refuse", has_receipt=True),
        6,
        "an `HTTPException(409)` after the writes",
        lambda answer: answer.status == 409,  # noqa: PLR2004
    ),
    "bug": Kind(
        _transfer(then="fail", has_receipt=True),
        4,
        "a `RuntimeError` after the writes",
        logged="^RuntimeError: a bug",
    ),
    "swallowed": Kind(
        _transfer(then="swallow", has_receipt=True),
        6,
        "an SQL error that the app catches",
        logged='ERROR: .* unique constraint "label_pkey"',
    ),
    "timeout": Kind(
        _transfer(then="time out", has_receipt=True),
        5,
        "an `asyncio.timeout()` that ends a statement in the app",
        lambda answer: answer.status == 504,  # noqa: PLR2004
    ),
    "deadlock": Kind(
        _pair(crosswise=True, has_receipt=True),
        5,
        "two transfers that lock the same accounts crosswise",
        logged="ERROR: +deadlock detected",
    ),
    "conflict": Kind(
        _pair(crosswise=False, is_serializable=True, has_receipt=True),
        5,
        "two SERIALIZABLE transactions that change the same rows",
        logged="ERROR: +could not serialize access",
    ),
    "left before body": Kind(
        _leaving_transfer("before body", 0.02),
        6,
        "the client leaves before its body is sent",
        _left,
    ),
    "left in handler": Kind(
        _leaving_transfer("in handler", 0.1, then="wait", has_receipt=True),
        10,
        "the client leaves in the handler",
        _left,
    ),
    "left after head": Kind(
        _statement("after head", 0.01), 6, "the client leaves between head and body", _left
    ),
    "left in body": Kind(_statement("in body"), 7, "the client leaves in mid-stream", _left),
}
