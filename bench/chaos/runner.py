"""One contestant's run: rounds of storm and calm, each on a server of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from bench.chaos import ledger
from bench.chaos.app import APPLICATION_NAME
from bench.chaos.audit import audit
from bench.chaos.client import Client
from bench.chaos.faults import Faults, connect
from bench.chaos.logs import Told, strikes
from bench.chaos.process import CALM, App
from bench.chaos.requests import Visitors
from bench.chaos.results import Results
from bench.postgres import WheelServer
from bench.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.chaos.faults import Connection

SETTINGS = {
    # An immediate restart kills the server: what it has confirmed must be in the log by then.
    # (In the log, not on the disk: the machine itself isn't switched off.)
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "deadlock_timeout": "50ms",
    "lock_timeout": "1s",
    "autovacuum": "on",
}

IMPATIENT = frozenset({"asyncpg", "ours_all"})
"""Drivers that are told how long to wait for an answer, and who sees to it without them."""

TRIED = 100
"""Requests that must succeed after each storm."""


@dataclass(frozen=True)
class Round:
    """How one round is.

    Attributes:
        pool_size: Of the app's engine.

        clients: At the same time.

        pause: Seconds between two faults, on average.

        storm: Seconds.

        ends_by: What the app's server is sent in the end.
    """

    pool_size: int
    clients: int
    pause: float
    storm: float
    ends_by: signal.Signals = signal.SIGTERM


ROUNDS = (
    Round(10, 24, 0.1, 10.0),
    Round(2, 200, 0.3, 8.0),
    Round(10, 24, 0.1, 4.0, signal.SIGKILL),
)
"""They take turns."""


class Run:
    """Runs one contestant.

    Args:
        contestant: The name of its module.

        python: The interpreter of its environment.

        driver: What the app reaches PostgreSQL with.

        seed: Of all chance.

        is_over: Asked after each round.

        logs: Where the app's logs are kept.

        tell: Told what is done, now and then.
    """

    def __init__(
        self,
        contestant: str,
        *,
        python: str = sys.executable,
        driver: str = "asyncpg",
        seed: int = 0,
        is_over: Callable[[Results], bool],
        logs: Path,
        tell: Callable[[Results, str], object],
    ) -> None:
        self.results = Results(contestant, driver)
        self._python = python
        self._chance = random.Random(seed)
        self._ids = itertools.count(1)
        self._is_over = is_over
        self._logs = logs
        self._tell = tell
        self._begun = time.monotonic()
        self._struck: Counter[str] = Counter()

    async def run(self) -> Results:
        """Run it."""
        server = WheelServer(**SETTINGS)
        try:
            await asyncio.to_thread(_create, server)
            async with Proxy(server.url()) as proxy:
                is_impatient = bool(IMPATIENT & {self.results.contestant, self.results.driver})
                faults = Faults(proxy, server, self._chance, swallows=is_impatient)
                self.results.faults = faults.counts
                for each in itertools.cycle(ROUNDS):
                    await self._run_round(each, server, proxy, faults)
                    self.results.rounds += 1
                    self.results.seconds = time.monotonic() - self._begun
                    if self._is_over(self.results):
                        return self.results
        finally:
            server.stop()
        raise AssertionError

    async def _run_round(
        self, each: Round, server: WheelServer, proxy: Proxy, faults: Faults
    ) -> None:
        log = self._logs / f"{self.results.contestant}-{self.results.rounds}.log"
        url = proxy.url.set(drivername=f"postgresql+{self.results.driver}")
        async with App(self._python, self.results.contestant, url, each.pool_size, log) as app:
            visitors = Visitors(app.port, self._chance, self._ids)
            await app.state()  # with nothing under way: what is there now is the server's own
            self.results.versions = app.versions
            self._tell(self.results, f"storm: {each.clients} clients, a pool of {each.pool_size}")
            async with _clients(visitors, each.clients):
                await faults.rage(each.storm, pause=each.pause, has_restart=True)
            self._tell(self.results, "calm")
            await self._look_around(app, server)
            await self._try_next(app.port)
            by = each.ends_by
            self._tell(self.results, f"{by.name} under load")
            before = {asked.id for asked in visitors.asked}
            visitors.is_over = False
            async with _clients(visitors, each.clients):
                await faults.rage(
                    self._chance.uniform(0.5, 1.5), pause=each.pause, has_restart=False
                )
                self.results.left["servers that didn't end"] += not await app.end(by)
            faults.counts[by.name] += 1
        await self._settle_accounts(
            server,
            visitors,
            Told.read(log),
            killed={asked.id for asked in visitors.asked} - before
            if by == signal.SIGKILL
            else set(),
        )

    async def _look_around(self, app: App, server: WheelServer) -> None:
        """What is left over once everything should be over."""
        connection = await connect(server.url(), "chaos audit")
        try:
            deadline = time.monotonic() + CALM
            while True:
                try:
                    state = await app.state()
                except RuntimeError:
                    self.results.left["apps that didn't answer"] += 1
                    return
                state["idle in transaction"] = await _count_backends(
                    connection, "idle in transaction%"
                )
                if not any(state.values()) or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.1)
        finally:
            await connection.close()
        if any(state.values()):
            self.results.named.append(state)
        state["tasks"] = len(state["tasks"])
        for name, count in state.items():
            self.results.left[name] += count

    async def _try_next(self, port: int) -> None:
        """Ordinary requests, one after the other."""
        client = Client(port)
        self.results.next_tried += TRIED
        for number in range(TRIED):
            one, other = self._chance.sample(range(ledger.ACCOUNTS), 2)
            content = {"id": next(self._ids), "sender": one, "recipient": other}
            answer = await client.request("POST", f"/transfers/{content['id']}", content)
            if answer.status != 201:  # noqa: PLR2004
                # Who doesn't answer one isn't asked for the others.
                self.results.next_failed += TRIED - number if answer.is_hung else 1
                self.results.named.append({"next": answer.status, "body": str(answer.body)})
            if answer.is_hung:
                break
        client.leave()

    async def _settle_accounts(
        self, server: WheelServer, visitors: Visitors, told: Told, killed: set[int]
    ) -> None:
        """The audit of one round; its server is gone."""
        results = self.results
        connection = await connect(server.url(), "chaos audit")
        try:
            deadline = time.monotonic() + CALM
            while await _count_backends(connection):
                if time.monotonic() > deadline:
                    results.left["backends of a server that is gone"] += 1
                    break
                await asyncio.sleep(0.1)
            await audit(
                connection,
                visitors.asked,
                results.findings,
                in_doubt=told.in_doubt,
                failed=told.failed,
                killed=killed,
            )
        finally:
            await connection.close()
        results.kinds += visitors.counts
        results.wrong_sums += len(visitors.wrong_sums)
        results.log += told.telltales
        self._struck += visitors.struck + strikes(told.text)
        results.struck = self._struck + strikes(server.log.read_text(errors="replace"))


@contextlib.asynccontextmanager
async def _clients(visitors: Visitors, number: int) -> Any:
    """Clients for the time of the block; it ends when the last has its answer."""
    async with asyncio.TaskGroup() as group:
        for _ in range(number):
            group.create_task(visitors.visit())
        try:
            yield
        finally:
            visitors.is_over = True


async def _count_backends(connection: Connection, state: str = "%") -> int:
    """How many of the app's connections the server knows in *state*."""
    found = await connection.execute(
        "SELECT FROM pg_stat_activity WHERE application_name = %s AND state LIKE %s",
        [APPLICATION_NAME, state],
    )
    return found.rowcount


def _create(server: WheelServer) -> None:
    """Start the server; make the tables."""
    engine = sa.create_engine(server.url().set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        ledger.Base.metadata.create_all(connection)
        connection.execute(
            sa.insert(ledger.Account),
            [{"id": id_, "balance": ledger.OPENING_BALANCE} for id_ in range(ledger.ACCOUNTS)],
        )
        connection.execute(sa.insert(ledger.Label).values(name=ledger.LABEL))
    engine.dispose()
