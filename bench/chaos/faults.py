"""What goes wrong beside the clients: at the network, in the database server."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import psycopg

from bench.chaos.app import APPLICATION_NAME
from tests.fix_proxy import after_commit, any_answer, any_query, before_commit

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from sqlalchemy import URL

    from tests.fix_postgres import WheelServer
    from tests.fix_proxy import Action, Fault, Proxy

    Connection = psycopg.AsyncConnection[tuple[Any, ...]]

LONGEST_DELAY = 2.5
"""Seconds; more than the driver waits for an answer."""

DEEPEST = 25
"""A fault at the n-th message is at this one at most."""

MEANINGS = {
    "terminated": "`pg_terminate_backend()` on one of the app's connections",
    "cut before COMMIT": "the connection ends, and COMMIT never reaches the server",
    "cut after COMMIT": "the connection ends after the server has committed, before it says so",
    "cut at a message": "the connection ends at the n-th message, to or from the server",
    "swallowed before COMMIT": "COMMIT gets lost, and the connection stays open",
    "swallowed after COMMIT": "the answer to COMMIT gets lost, and the connection stays open",
    "swallowed at a message": "the n-th message gets lost with all that follow it",
    "delayed before COMMIT": f"COMMIT reaches the server up to {LONGEST_DELAY} seconds later",
    "delayed after COMMIT": f"the answer to COMMIT comes up to {LONGEST_DELAY} seconds later",
    "restarted fast": "the server is restarted; it ends all transactions first",
    "restarted immediate": "the server is killed and recovers from its log",
    "SIGTERM": "the app's server is told to end while clients are at it",
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
        self._swallowing = 1 if swallows else 0
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
                [harm] = self._chance.choices(_HARMS, _WEIGHTS)
                await harm(self)
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
        mode = self._chance.choice(["fast", "immediate"])
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
            self.counts["terminated"] += len(await ended.fetchall())

    async def _strike_commit(self) -> None:
        actions: list[Action] = ["cut", "swallow", "delay"]
        [action] = self._chance.choices(actions, [6, self._swallowing, 2])
        place, name = self._chance.choice([(before_commit, "before"), (after_commit, "after")])
        seconds = min(self._chance.expovariate(1.5), LONGEST_DELAY)
        fault = self._proxy.arm(action, place, seconds=seconds)
        self._armed.append((f"{_PAST[action]} {name} COMMIT", fault))

    async def _strike_message(self) -> None:
        actions: list[Action] = ["cut", "swallow"]
        [action] = self._chance.choices(actions, [6, self._swallowing])
        place = self._chance.choice([any_query, any_answer])
        fault = self._proxy.arm(action, place, nth=self._chance.randint(1, DEEPEST))
        self._armed.append((f"{_PAST[action]} at a message", fault))


_PAST: dict[Action, str] = {"cut": "cut", "swallow": "swallowed", "delay": "delayed"}
_HARMS: list[Callable[[Faults], Any]] = [
    Faults._terminate,  # noqa: SLF001
    Faults._strike_commit,  # noqa: SLF001
    Faults._strike_message,  # noqa: SLF001
]
_WEIGHTS = [3, 5, 2]


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
