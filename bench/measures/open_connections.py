"""What an open stream and an open websocket cost while nothing happens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from bench.measure import Bars, Bench, Json, Table, Unit, by_group, flat
from bench.servers import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.servers import Server

WAYS = ("bare", "by_hand", "ours")
KINDS = ("stream", "websocket")
WARM = 20

HANDSHAKE = (
    b"GET /idle HTTP/1.1\r\nhost: bench\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


async def hold_open(server: Server, kind: str, number: int) -> dict[str, float]:
    """Open so many; what each costs, and how many connections of the pool they use."""
    opened = [await connect(server, kind) for _ in range(WARM)]
    before = await server.state(collect="on", trace="on")
    opened += [await connect(server, kind) for _ in range(number)]
    after = await server.state(collect="on")
    for each in opened:
        each.leave()
    await server.idle_state(trace="off")
    if number != after["under way"] - before["under way"]:
        raise server.failure(f"{after['under way'] - before['under way']} of {number} are open")
    return {
        "traced": round((after["traced"] - before["traced"]) / number),
        "resident": round((after["resident"] - before["resident"]) / number),
        "checked out": after["checked out"],
    }


async def connect(server: Server, kind: str) -> Connection:
    """A connection whose response has begun."""
    if kind == "stream":
        connection = await server.open("open")
    else:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", server.port))
        connection.writer.write(HANDSHAKE)
    head = await connection.reader.readuntil(b"\r\n\r\n")
    if head.split()[1] not in {b"200", b"101"}:
        raise server.failure(head.decode())
    return connection


class OpenConnections:
    name = "open_connections"
    title = "Open streams and websockets"
    about = (
        "A stream has read a row, sent its head and its first byte; a websocket is accepted. Then "
        "both wait, each with its session scope, and nothing happens. *Bytes* are what Python's "
        "allocator has given out for one more of them, the server's part included; the pool is "
        "one of five."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        number = int(bench.budget(1_000, 50))

        async def measure(servers: Sequence[Server], tell: Callable[[float], None]) -> Json:
            found: dict[str, Json] = {each.name: {} for each in servers}
            turns = [(server, kind) for server in servers for kind in KINDS]
            for done, (server, kind) in enumerate(turns):
                found[server.name][kind] = await hold_open(server, kind, number)
                tell((done + 1) / len(turns))
            return {"number": number, **found}

        return by_group(bench, ("starlette",), number * 0.01 + 1, measure, WAYS)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        told = flat(found)
        number = told.pop("number", 0)
        bare = next((each for name, each in told.items() if ".bare" in name), None)
        columns = [
            column
            for kind in KINDS
            for column in (f"{kind}: bytes", "above the bare app", "connections out of the pool")
        ]
        rows = {
            name: [cell for kind in KINDS for cell in _cells(kinds[kind], bare and bare[kind])]
            for name, kinds in told.items()
        }
        charts = [
            Bars(
                f"open-{kind}",
                f"Bytes for an open {kind}",
                {name: kinds[kind]["traced"] for name, kinds in told.items()},
            )
            for kind in KINDS
        ]
        return [Table(f"{number:,} of each, open at the same time", columns, rows, charts=charts)]


def _cells(told: Mapping[str, float], bare: Mapping[str, float] | None) -> list[str]:
    above = "" if bare is None else f"{told['traced'] - bare['traced']:+,.0f}"
    return [f"{told['traced']:,}", above, f"{told['checked out']}"]


MEASURE = OpenConnections()
