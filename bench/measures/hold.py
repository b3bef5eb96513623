"""How long a request holds its connection, and what becomes of others meanwhile."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING

from bench.chaos.client import Client
from bench.measure import ASYNC_GROUPS, Bars, Bench, Json, Table, Unit, by_group, flat
from bench.servers import POOL_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.servers import Server

OCCASIONS = {"stream": "a body of 160 ms", "background": "a background task of 200 ms"}

CROWDS = {
    "large": "20 slow readers of 16 MB",
    "long_background": "20 background tasks of two seconds",
}
CROWD = 20
PROBES = 10

PATIENCE = 3.0
"""Seconds that a probe waits for its answer."""

SLOWED = 200.0
"""Milliseconds that the others' median may grow by: who waits for a connection waits longer."""


async def late_holds(server: Server, route: str, times: int) -> float:
    """Milliseconds that a connection is held after the head has gone out: the median."""
    await server.state(watch="on")
    client = Client(server.port)
    for _ in range(times):
        answer = await client.request("GET", f"/{route}")
        if not answer.is_complete:
            raise server.failure(f"/{route} gave {answer.status}")
    client.leave()
    holds: list[dict[str, float]] = (await server.idle_state(watch="off"))["holds"]
    if times != len(holds):
        raise server.failure(f"{len(holds)} of {times} requests were seen")
    return statistics.median(each["held after the head"] for each in holds)


async def waits_beside(server: Server, route: str) -> dict[str, float]:
    """Milliseconds that others wait for one SELECT: alone, and beside a crowd."""
    await server.warm("select")
    calm = await probe(server)
    crowd = [await server.open(route, window=4096) for _ in range(CROWD)]
    heads = [asyncio.create_task(each.reader.readuntil(b"\r\n\r\n")) for each in crowd]
    try:
        # Whoever holds no connection has sent them all by then, and filled the kernel's buffers.
        await asyncio.wait(heads, timeout=1.0)
        await asyncio.sleep(0.2)
        beside = await probe(server)
    finally:
        for each in heads:
            each.cancel()
        await asyncio.gather(*heads, return_exceptions=True)
        for connection in crowd:
            connection.leave()
    await server.idle_state()
    return {"calm": statistics.median(calm), "beside": statistics.median(beside)}


async def probe(server: Server) -> list[float]:
    """Milliseconds that requests take, each on a connection of its own, until one is stuck."""
    waits: list[float] = []
    for _ in range(PROBES):
        client = Client(server.port)
        start = time.perf_counter()
        answer = await client.request("GET", "/select", patience=PATIENCE)
        client.leave()
        if answer.is_hung:
            return [PATIENCE * 1e3]
        if not answer.is_complete:
            raise server.failure(f"/select gave {answer.status}")
        waits.append((time.perf_counter() - start) * 1e3)
    return waits


class Hold:
    name = "hold"
    title = "How long a connection is held"
    about = (
        "By the pool's events: a request reads a row; then its body takes 160 ms, or it has a "
        "background task of 200 ms, and neither uses the database. Told is how many milliseconds "
        "its connection is out of the pool *after* the head has gone out, where none is needed.\n\n"
        f"By the others: a pool of {POOL_SIZE}, {CROWD} clients that read 16 MB slowly, or "
        f"{CROWD} background tasks of two seconds, and beside them requests with one SELECT. Told "
        "is their median wait in milliseconds, before and beside the crowd; *slowed* is one that "
        f"grew by more than {SLOWED:.0f}, *stuck* one that got no answer in {PATIENCE:.0f} seconds."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        times = int(bench.budget(5, 1))

        async def measure(servers: Sequence[Server], tell: Callable[[float], None]) -> Json:
            racing = [each for each in servers if ".bare" not in each.name]
            found: dict[str, Json] = {each.name: {} for each in racing}
            for route in OCCASIONS:  # they sleep: all at the same time
                holds = await asyncio.gather(*(late_holds(each, route, times) for each in racing))
                for server, held in zip(racing, holds, strict=True):
                    found[server.name][route] = round(held, 2)
            tell(0.3)
            for done, few in enumerate(racing[at : at + 3] for at in range(0, len(racing), 3)):
                for route in CROWDS:
                    waits = await asyncio.gather(*(waits_beside(each, route) for each in few))
                    for server, told in zip(few, waits, strict=True):
                        found[server.name][route] = told
                tell(0.3 + 0.7 * (3 * done + len(few)) / len(racing))
            return found

        return by_group(bench, ASYNC_GROUPS, 3, measure)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        columns = [
            *(f"{title}: held ms more" for title in OCCASIONS.values()),
            *(f"others beside {title}" for title in CROWDS.values()),
        ]
        rows = {
            name: [
                *(f"{told[route]:.1f}" for route in OCCASIONS),
                *(_beside(told[route]) for route in CROWDS),
            ]
            for name, told in flat(found).items()
        }
        charts = [
            Bars(
                f"hold-{route}",
                f"Connection held during {title}: milliseconds more than needed",
                {name: told[route] for name, told in flat(found).items()},
            )
            for route, title in OCCASIONS.items()
        ]
        return [Table("Connections held, and others", columns, rows, charts=charts)]


def is_slowed(waits: Mapping[str, float]) -> bool:
    """Whether others had to wait for a connection."""
    return waits["beside"] - waits["calm"] > SLOWED


def _beside(waits: Mapping[str, float]) -> str:
    if waits["beside"] >= PATIENCE * 1e3:
        return "**stuck**"
    told = f"{waits['calm']:.0f} → {waits['beside']:.0f}"
    return f"**slowed**: {told}" if is_slowed(waits) else f"not slowed: {told}"


MEASURE = Hold()
