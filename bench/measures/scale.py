"""Whether a request costs more the more there was before it."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING, Any

from bench.apps import SELECT
from bench.calls import count_calls
from bench.frameworks.asgi import START
from bench.measure import Bench, Json, Table, Unit
from bench.served import discard, receive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.served import Served

TIMED = 200
"""Requests whose median is told."""

HOOKS = 5
"""Of each request that registers any: as many that wait for COMMIT as for the response's end."""


class Past:
    """A raw ASGI app in the middleware, which may leave all behind that a request can."""

    def __init__(self, served: Served) -> None:
        from asgi_dbscope import Database, DBSessionMiddleware

        self._served = served
        self._database: Any = Database(served.engine)
        self._app = DBSessionMiddleware(self._answer, database=self._database)
        self._is_over = asyncio.Event()
        self.tasks: list[asyncio.Task[Any]] = []
        self.hooks = 0
        self.has_tasks = False

    async def _answer(self, _scope: Any, _receive: Any, send: Any) -> None:
        name = await self._database.session.scalar(SELECT)
        for _ in range(self.hooks):
            self._database.on_commit(int)
            self._database.on_commit(int, when="after_response")
        if self.has_tasks:
            self.tasks.append(asyncio.create_task(self._is_over.wait()))
        await send({**START})
        await send({"type": "http.response.body", "body": name.encode()})

    async def serve(self, requests: int) -> None:
        for _ in range(requests):
            await self._app(self._served.scope("select"), receive, discard)

    async def cost(self) -> dict[str, float]:
        """Calls that the package makes for a request, and microseconds of the processor."""
        import asgi_dbscope

        times = []
        for _ in range(TIMED):
            start = time.process_time()
            await self.serve(1)
            times.append((time.process_time() - start) * 1e6)
        calls = await count_calls(asgi_dbscope, self.serve(1))
        return {"calls": calls, "cpu": round(statistics.median(times), 1)}

    async def end(self) -> None:
        self._is_over.set()
        await asyncio.gather(*self.tasks)


async def grow(served: Served, requests: int) -> dict[str, dict[str, float]]:
    """What a request costs at first, and then with more and more behind it."""
    past = Past(served)
    await past.serve(20)
    found = {"at first": await past.cost()}
    await past.serve(requests)
    found[f"after {requests:,} more"] = await past.cost()
    past.hooks = HOOKS
    await past.serve(requests)
    past.hooks = 0
    found[f"after {requests:,} more, with {2 * HOOKS} hooks each"] = await past.cost()
    past.has_tasks = True
    await past.serve(requests)
    past.has_tasks = False
    found[f"beside {requests:,} tasks that outlived their requests"] = await past.cost()
    await past.end()
    return found


class Scale:
    name = "scale"
    title = "After many requests"
    about = (
        "One SELECT with `DBSessionMiddleware`, in one process, after more and more requests. "
        "*Calls* are those that the package makes, its own functions and Python's: a number that "
        "repeats exactly. *CPU* is the median in microseconds, with what Python's garbage "
        "collector has to look at in it."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        requests = int(bench.budget(1_000, 50))
        ours = [each for each in bench.contestants if each.name == "asgi.ours"]

        def run(bench: Bench, _tell: Callable[[float], None]) -> Json:
            with bench.worker(ours[0]) as worker:
                return worker.call(grow, requests)

        return [Unit("select", [each.name for each in ours], requests * 0.008 + 4, run)]

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        rows = {
            what: [f"{cost['calls']}", f"{cost['cpu']:,.0f}"]
            for what, cost in found["select"].items()
        }
        return [Table("One SELECT, later", ["calls", "CPU"], rows)]


MEASURE = Scale()
