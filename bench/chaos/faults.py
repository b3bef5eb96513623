"""What goes wrong beside the clients: at the network, in the database server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import psycopg

from bench.chaos.app import APPLICATION_NAME
from bench.chaos.logs import CROWD
from bench.proxy import after_commit, any_answer, any_query, before_commit

if TYPE_CHECKING:
    import random

    from sqlalchemy import URL

    from bench.postgres import WheelServer
    from bench.proxy import Fault, Place, Proxy

    Connection = psycopg.AsyncConnection[tuple[Any, ...]]

LONGEST_STALL = 2.5
"""Seconds; more than the driver waits for an answer."""

DEEPEST = 25
"""A fault at the n-th message is at this one at most."""

TERMINATED = "terminated"


@dataclass(frozen=True)
class Strike:
    """What the proxy does to a connection.

    Attributes:
        action: What.

        places: At which message; one of them is chosen.

        weight: How often, in a deck.

        means: In a line.

        is_counted: Whether it is the n-th such message, instead of the next.
    """

    action: Literal["cut", "swallow", "delay"]
    places: tuple[Place, ...]
    weight: int
    means: str
    is_counted: bool = False


STRIKES = {
    "cut before COMMIT": Strike(
        "cut", (before_commit,), 3, "the connection ends, and COMMIT never reaches the server"
    ),
    "cut after COMMIT": Strike(
        "cut",
        (after_commit,),
        3,
        "the connection ends after the server has committed, before it says so",
    ),
    "cut at a message": Strike(
        "cut",
        (any_query, any_answer),
        3,
        "the connection ends at the n-th message, to or from the server",
        is_counted=True,
    ),
    "stalled before COMMIT": Strike(
        "delay", (before_commit,), 1, f"COMMIT reaches the server up to {LONGEST_STALL} s later"
    ),
    "stalled after COMMIT": Strike(
        "delay", (after_commit,), 1, f"the answer to COMMIT comes up to {LONGEST_STALL} s later"
    ),
    "stalled at a message": Strike(
        "delay",
        (any_query, any_answer),
        1,
        f"the n-th message, and all that follow it, come up to {LONGEST_STALL} s later",
        is_counted=True,
    ),
    "swallowed before COMMIT": Strike(
        "swallow", (before_commit,), 1, "COMMIT gets lost, and the connection stays open"
    ),
    "swallowed after COMMIT": Strike(
        "swallow", (after_commit,), 1, "the answer to COMMIT gets lost; the connection stays open"
    ),
    "swallowed at a message": Strike(
        "swallow",
        (any_query, any_answer),
        1,
        "the n-th message gets lost with all that follow it",
        is_counted=True,
    ),
}

DECK = [TERMINATED] * 5 + [name for name, each in STRIKES.items() for _ in range(each.weight)]
"""What happens, in an order that is chance's: so each of them does."""

RESTARTS = ("fast", "immediate", "immediate", "fast")
"""They take turns, not in step with the rounds."""

MEANINGS = {
    TERMINATED: "`pg_terminate_backend()` on one of the app's connections",
    **{name: each.means for name, each in STRIKES.items()},
    "restarted fast": "the server is restarted; it ends all transactions first",
    "restarted immediate": "the server is killed and recovers from its log",
    CROWD: "no connection came free in time, as the app's log says",
    "SIGTERM": "the app's server is told to end while clients are at it",
    "SIGKILL": "the app's server is killed while clients are at it",
}


class Faults:
    """Lets things go wrong until it is told to stop.

    Args:
        proxy: Between app and server.

        server: The database.

        chance: What it decides by.

        swallows: Whether messages get lost on connections that stay open.

    Attributes:
        counts: What has happened, how often.
    """

    def __init__(
        self, proxy: Proxy, server: WheelServer, chance: random.Random, *, swallows: bool
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._proxy = proxy
        self._server = server
        self._chance = chance
        self._deck = [
            name
            for name in DECK
            if swallows or name == TERMINATED or STRIKES[name].action != "swallow"
        ]
        self._left: list[str] = []
        self._restarts = itertools.cycle(RESTARTS)
        self._armed: list[tuple[str, Fault]] = []
        self._admin: Connection | None = None

    async def rage(self, seconds: float, *, pause: float, has_restart: bool) -> None:
        """Do harm for *seconds*, every *pause* on average."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        restart_at = loop.time() + seconds * self._chance.uniform(0.3, 0.6)
        try:
            while loop.time() < end:
                await asyncio.sleep(self._chance.expovariate(1 / pause))
                if has_restart and loop.time() >= restart_at:
                    has_restart = False
                    await self._restart()
                await self._do(self._draw())
        finally:
            await self.calm()

    async def calm(self) -> None:
        """Stop, and count what has happened."""
        self._proxy.disarm()
        for name, fault in self._armed:
            self.counts[name] += len(fault.struck)
        self._armed.clear()
        if self._admin is not None:
            await self._admin.close()
            self._admin = None

    async def _restart(self) -> None:
        mode = next(self._restarts)
        await asyncio.to_thread(self._server.restart, mode)
        self.counts[f"restarted {mode}"] += 1

    async def _terminate(self) -> None:
        with contextlib.suppress(psycopg.Error):  # it may be restarting
            if self._admin is None or self._admin.closed:
                self._admin = await connect(self._server.url(), "chaos faults")
            ended = await self._admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = %s ORDER BY random() LIMIT 1",
                [APPLICATION_NAME],
            )
            self.counts[TERMINATED] += len(await ended.fetchall())

    def _draw(self) -> str:
        if not self._left:
            self._left = self._chance.sample(self._deck, len(self._deck))
        return self._left.pop()

    async def _do(self, name: str) -> None:
        if name == TERMINATED:
            await self._terminate()
            return
        strike = STRIKES[name]
        fault = self._proxy.arm(
            strike.action,
            self._chance.choice(strike.places),
            nth=self._chance.randint(1, DEEPEST) if strike.is_counted else 1,
            seconds=min(self._chance.expovariate(1.5), LONGEST_STALL),
        )
        self._armed.append((name, fault))


async def connect(url: URL, name: str) -> Connection:
    """A connection that bypasses the proxy."""
    return await psycopg.AsyncConnection.connect(
        host=str(url.query["host"]),
        user=url.username,
        dbname=url.database,
        connect_timeout=10,
        application_name=name,
        autocommit=True,
    )
