"""Time to the first byte of a streamed response."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from bench.measure import ASYNC_GROUPS, Bench, Json, Table, Unit, by_group, flat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.servers import Server


async def first_byte(server: Server) -> tuple[float, float]:
    """Milliseconds from the request to its head, and to the first byte of its body."""
    start = time.perf_counter()
    connection = await server.open("stream")
    try:
        await connection.reader.readuntil(b"\r\n\r\n")
        head = time.perf_counter()
        await connection.reader.readexactly(1)
        first = time.perf_counter()
    finally:
        connection.leave()
    return (head - start) * 1e3, (first - start) * 1e3


class FirstByte:
    name = "first_byte"
    title = "Time to the first byte"
    about = (
        "A request reads a row and streams 16 chunks, one each 10 ms. Milliseconds from the "
        "request on a new connection to the response's head, and to the first byte of its body: "
        "medians, and the 90th percentile. The contestants take turns."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        rounds = int(bench.budget(50, 5))

        async def measure(servers: Sequence[Server], tell: Callable[[float], None]) -> Json:
            samples: dict[str, list[tuple[float, float]]] = {each.name: [] for each in servers}
            for server in servers:
                await server.warm("stream")
            for done in range(rounds):
                for server in servers:
                    samples[server.name].append(await first_byte(server))
                tell((done + 1) / rounds)
            for server in servers:
                await server.idle_state()
            return {
                name: [[round(head, 3), round(first, 3)] for head, first in each]
                for name, each in samples.items()
            }

        return by_group(bench, ASYNC_GROUPS, rounds * 0.008 + 0.2, measure)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        rows = {}
        for name, samples in flat(found).items():
            heads, firsts = zip(*samples, strict=True)
            rows[name] = [
                f"{statistics.median(heads):.2f}",
                f"{statistics.median(firsts):.2f}",
                f"{statistics.quantiles(firsts, n=10)[-1]:.2f}",
            ]
        columns = ["head", "first byte", "first byte, 90 %"]
        return [Table("Milliseconds to the head and the first byte", columns, rows)]


MEASURE = FirstByte()
