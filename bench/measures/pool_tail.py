"""How long requests wait where the pool has fewer connections than there are clients."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from bench.measure import Bench, Json, Table, Unit, by_group, flat
from bench.servers import POOL_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.servers import Server

CLIENTS = 40

COLUMNS = ("p50", "p99", "max")

UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3}


async def tail(server: Server) -> dict[str, float]:
    """Milliseconds: the median, the 99th percentile and the worst."""
    told = await server.wrk("select", clients=CLIENTS, seconds=1)
    await server.idle_state()
    return read(told)


def read(told: str) -> dict[str, float]:
    """What wrk printed with `--latency`."""
    found = dict(re.findall(r"^\s+(50|99)%\s+(\S+)", told, re.MULTILINE))
    worst = re.findall(r"^\s+Latency(?:\s+[\d.]+\w+){2}\s+(\S+)", told, re.MULTILINE)
    times = [found["50"], found["99"], *worst]
    return dict(zip(COLUMNS, map(_milliseconds, times), strict=True))


def _milliseconds(told: str) -> float:
    number, unit = re.findall(r"([\d.]+)([a-z]+)", told)[0]
    return round(float(number) * UNITS[unit], 3)


class PoolTail:
    name = "pool_tail"
    title = "Under an exhausted pool"
    about = (
        f"{CLIENTS} clients want the {POOL_SIZE} connections of the pool, for one SELECT each: "
        "milliseconds that a request takes. The contestants take turns of a second, there "
        "and back; told are the lower and the higher of the two turns."
    )
    needs: Sequence[str] = ("wrk",)

    def units(self, bench: Bench) -> list[Unit]:
        async def measure(servers: Sequence[Server], tell: Callable[[float], None]) -> Json:
            racing = [each for each in servers if ".bare" not in each.name]
            for server in racing:
                await server.warm("select")
            found: dict[str, list[dict[str, float]]] = {each.name: [] for each in racing}
            turns = racing + racing[::-1]
            for done, server in enumerate(turns):
                found[server.name].append(await tail(server))
                tell((done + 1) / len(turns))
            return found

        return by_group(bench, ("asgi", "fastapi"), 2.6, measure)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        rows = {
            name: [_cell([turn[column] for turn in turns]) for column in COLUMNS]
            for name, turns in flat(found).items()
        }
        return [Table("Milliseconds for one SELECT", list(COLUMNS), rows)]


def _cell(turns: Sequence[float]) -> str:
    return f"{min(turns):,.1f} to {max(turns):,.1f}"


MEASURE = PoolTail()
