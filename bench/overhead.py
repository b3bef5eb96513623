"""What a request costs with DBSessionMiddleware, beside the bare app and the session by hand.

Every contestant is a raw ASGI app, driven in this process without a server. All of them run in one
interleaved run (A B C ... A B C ... in small batches), so that what disturbs the machine disturbs
each of them; what is compared are the pairs of one round. `bench/README.md` says how to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The installed package is what is measured; the checkout serves where none is installed.
sys.path.append(str(Path(__file__).parents[1]))

from sqlalchemy import make_url, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_dbscope import Database, DBSessionMiddleware, current_session

App = Callable[..., Awaitable[Any]]
HAND, OURS = "by hand", "ours"


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = f"asgi_dbscope_bench_{os.getpid()}"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


SELECT = select(Item.name).where(Item.id == 1)


# ------------------------------------------------------------------ the contestants


@dataclass(frozen=True)
class Contestant:
    row: str
    column: str
    app: App

    @property
    def key(self) -> tuple[str, str]:
        return self.row, self.column


ROWS = {
    "none": "no database",
    "unused": "session obtained, not used",
    "select": "one SELECT",
    "commit": "one SELECT, committed",
    "insert": "one INSERT, committed",
}


async def answer(send: Any, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
    await send({"type": "http.response.body", "body": body})


async def bare(_scope: Any, _receive: Any, send: Any) -> None:
    await answer(send, b"item")


def apps_by_hand(engine: AsyncEngine) -> dict[str, App]:
    session_factory = async_sessionmaker(engine, expire_on_commit=False)

    async def unused(_scope: Any, _receive: Any, send: Any) -> None:
        async with session_factory():
            pass
        await answer(send, b"item")

    async def select_(_scope: Any, _receive: Any, send: Any) -> None:
        async with session_factory() as session:
            name = await session.scalar(SELECT)
        await answer(send, name.encode())

    async def commit(_scope: Any, _receive: Any, send: Any) -> None:
        async with session_factory.begin() as session:
            name = await session.scalar(SELECT)
        await answer(send, name.encode())

    async def insert(_scope: Any, _receive: Any, send: Any) -> None:
        async with session_factory() as session:
            session.add(Item(name="item"))
            await session.commit()
        await answer(send, b"item")

    return {"none": bare, "unused": unused, "select": select_, "commit": commit, "insert": insert}


def our_apps(engine: AsyncEngine) -> dict[str, App]:
    database = Database(engine)

    async def unused(_scope: Any, _receive: Any, send: Any) -> None:
        current_session()
        await answer(send, b"item")

    async def select_(_scope: Any, _receive: Any, send: Any) -> None:
        name = await current_session().scalar(SELECT)
        await answer(send, name.encode())

    async def insert(_scope: Any, _receive: Any, send: Any) -> None:
        current_session().add(Item(name="item"))
        await answer(send, b"item")

    apps = {"none": bare, "unused": unused, "select": select_, "commit": select_, "insert": insert}
    return {row: DBSessionMiddleware(app, database=database) for row, app in apps.items()}


def contestants(by_hand: AsyncEngine, ours: AsyncEngine, rows: list[str]) -> list[Contestant]:
    """The two engines have one database; each has only its own side's listeners."""
    columns = {HAND: apps_by_hand(by_hand), OURS: our_apps(ours)}
    return [Contestant(row, column, columns[column][row]) for row in rows for column in columns]


async def receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def serve(app: App, requests: int) -> None:
    """Be the server: a scope, a `receive` and a `send` for each request, one after the other."""

    async def send(message: dict[str, Any]) -> None:
        pass

    for _ in range(requests):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/items/1",
            "raw_path": b"/items/1",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"bench")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await app(scope, receive, send)


async def check(app: App) -> None:
    """A contestant that doesn't answer right is not in the race."""
    messages: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    await app({"type": "http", "method": "GET", "path": "/items/1"}, receive, send)
    assert [m.get("body") for m in messages] == [None, b"item"], messages


@contextlib.asynccontextmanager
async def contest(url: str, only: list[str]) -> Any:
    """Create the table, give the contestants, drop the table."""
    engines = create_async_engine(url), create_async_engine(url)
    async with engines[0].begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(Item.__table__.insert().values(name="item"))  # id 1
    try:
        running = contestants(*engines, only)
        for each in running:
            await check(each.app)
        yield running
    finally:
        async with engines[0].begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
        for engine in engines:
            await engine.dispose()


# ------------------------------------------------------------------ time


Samples = dict[tuple[str, str], list[float]]
MIN_ROUNDS = 3


async def measure_time(
    running: list[Contestant], *, seconds: float, batch_seconds: float
) -> dict[str, Samples]:
    """Interleave the contestants' batches; return microseconds per request, one per round."""
    sizes = {each.key: await calibrate(each.app, batch_seconds) for each in running}
    wall: Samples = {each.key: [] for each in running}
    cpu: Samples = {each.key: [] for each in running}
    gc.collect()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(wall[running[0].key]) < MIN_ROUNDS:
        for each in running:
            size = sizes[each.key]
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            await serve(each.app, size)
            cpu[each.key].append((time.process_time() - cpu_start) / size * 1e6)
            wall[each.key].append((time.perf_counter() - wall_start) / size * 1e6)
    return {"wall": wall, "cpu": cpu}


async def calibrate(app: App, batch_seconds: float) -> int:
    """How many requests make a batch; this also warms the contestant up."""
    await serve(app, 20)
    start = time.perf_counter()
    await serve(app, 20)
    return max(1, round(20 * batch_seconds / (time.perf_counter() - start)))


# ------------------------------------------------------------------ instructions


REQUESTS = 40, 140
"""Each contestant serves both counts; the difference is free of what a count costs once."""


def measure_instructions(url: str, only: list[str]) -> Samples:
    """Count instructions per request, in a child of this script under callgrind."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        child = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"),
                f"--dump-before={MARK.__name__}",
                *(sys.executable, __file__, "--count", "--database", url, "--only", *only),
            ],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        dumps = (_total(out.with_name(f"out.{n}")) for n in itertools.count(1))
        found: Samples = {}
        for line in child.stdout.splitlines():
            row, column = line.split("\t")
            _before, few, many = next(dumps), next(dumps), next(dumps)
            found[row, column] = [(many - few) / (REQUESTS[1] - REQUESTS[0])]
    return found


MARK = os.getloadavg
"""Callgrind writes down its count and begins anew whenever the C library's `getloadavg` is called:
a function that nothing else calls, and that is found without debugging symbols."""


def _total(dump: Path) -> int:
    line = next(each for each in dump.read_text().splitlines() if each.startswith("totals:"))
    return int(line.split()[1])


async def count(running: list[Contestant]) -> None:
    """What the child under callgrind does: three marks for each contestant."""
    for each in running:
        await serve(each.app, 20)
        gc.collect()
        MARK()
        for requests in REQUESTS:
            await serve(each.app, requests)
            MARK()
        print(each.row, each.column, sep="\t")


# ------------------------------------------------------------------ memory


async def measure_memory(
    running: list[Contestant], requests: dict[str, int]
) -> list[dict[str, Any]]:
    """Growth per request, and what a request leaves to the cycle collector."""
    found = []
    gc.freeze()  # the many objects of the modules need not be looked at again and again
    for each in running:
        number = requests[each.row]
        await serve(each.app, number // 10)  # caches fill
        gc.collect()
        before = resident()
        await serve(each.app, number)
        gc.collect()
        grown = resident() - before
        tracemalloc.start()
        await serve(each.app, number // 40)
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0]
        await serve(each.app, number // 20)
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0] - traced
        tracemalloc.stop()
        gc.disable()
        await serve(each.app, number // 10)
        cyclic = gc.collect() / (number // 10)
        gc.enable()
        found.append(
            {
                "row": each.row,
                "column": each.column,
                "requests": number,
                "resident": grown / number,
                "traced": traced / (number // 20),
                "cyclic": cyclic,
            }
        )
    return found


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


# ------------------------------------------------------------------ the tables


def summary(samples: Samples, row: str) -> dict[str, Any]:
    """Medians, and the quartiles of what the pairs of one round give."""
    hand, ours = samples[row, HAND], samples[row, OURS]
    found = {
        "by hand": statistics.median(hand),
        "ours": statistics.median(ours),
        "rounds": len(ours),
        "ratio": _quartiles([b / a for a, b in zip(hand, ours, strict=True)]),
    }
    if bare := samples.get(("none", HAND)):
        found["above bare"] = _quartiles([b - a for a, b in zip(bare, ours, strict=True)])
        found["by hand above bare"] = _quartiles([b - a for a, b in zip(bare, hand, strict=True)])
    return found


def _quartiles(values: list[float]) -> list[float]:
    """The lower quartile, the median, the upper quartile."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


def print_table(title: str, rows: dict[str, dict[str, Any]], digits: int) -> None:
    print(f"\n| {title} | by hand | ours | by hand above bare | ours above bare | ours / by hand |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row, found in rows.items():
        cells = [f"{found[column]:,.{digits}f}" for column in (HAND, OURS)]
        cells += [_spread(found.get(key), digits) for key in ("by hand above bare", "above bare")]
        cells += [_spread(found["ratio"], 3)]
        print(f"| {ROWS[row]} | {' | '.join(cells)} |")


def _spread(quartiles: list[float] | None, digits: int) -> str:
    if quartiles is None:
        return ""
    low, middle, high = (f"{each:,.{digits}f}" for each in quartiles)
    return middle if low == high else f"{middle} ({low} to {high})"


def print_memory(found: list[dict[str, Any]]) -> None:
    print("\n| growth per request | | requests | resident bytes | traced bytes | cyclic objects |")
    print("| --- | --- | --- | --- | --- | --- |")
    for each in found:
        print(
            f"| {ROWS[each['row']]} | {each['column']} | {each['requests']:,} "
            f"| {each['resident']:.2f} | {each['traced']:.2f} | {each['cyclic']:.2f} |"
        )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("asgi-dbscope", "sqlalchemy", "greenlet", "anyio", "asyncpg", "aiosqlite"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


# ------------------------------------------------------------------ the command line


@contextlib.contextmanager
def some_database(url: str | None) -> Iterator[str]:
    """The one named, else PostgreSQL from the wheel on a unix socket, else an SQLite file."""
    if url is not None:
        yield url
        return
    try:
        from tests.fix_postgres import PostgresUnavailable, WheelServer

        server = WheelServer()
        url = server.url().set(drivername="postgresql+asyncpg").render_as_string()
    except (ImportError, PostgresUnavailable) as error:
        print(f"no PostgreSQL ({error}); an SQLite file instead", file=sys.stderr)
        with tempfile.TemporaryDirectory() as directory:
            yield f"sqlite+aiosqlite:///{directory}/bench.db"
        return
    try:
        yield url
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--database", metavar="URL", help="default: PostgreSQL from the wheel")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of timing; default %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--no-instructions", action="store_true", help="leave callgrind out")
    parser.add_argument(
        "--memory", action="store_true", help="growth over 200,000 requests instead"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with some_database(options.database) as url:
        if options.count:
            asyncio.run(_with_contest(url, options.only, count))
            return
        report = {
            "machine": machine(),
            "versions": versions(),
            "database": make_url(url).drivername,
        }
        print(f"{report['machine']}; {report['database']}")
        print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
        measure = report_memory if options.memory else report_costs
        report |= measure(url, options)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def report_costs(url: str, options: argparse.Namespace) -> dict[str, Any]:
    seconds = 0.5 if options.quick else options.seconds

    async def measure(running: list[Contestant]) -> dict[str, Samples]:
        return await measure_time(running, seconds=seconds, batch_seconds=seconds / 2000)

    samples = asyncio.run(_with_contest(url, options.only, measure))
    if not options.no_instructions and shutil.which("valgrind") is not None:
        samples["instructions"] = measure_instructions(url, options.only)
    report = {}
    for measured, title, digits in (
        ("wall", "microseconds", 2),
        ("cpu", "microseconds of CPU", 2),
        ("instructions", "instructions", 0),
    ):
        if measured in samples:
            report[measured] = {row: summary(samples[measured], row) for row in options.only}
            print_table(title, report[measured], digits)
    return report


def report_memory(url: str, options: argparse.Namespace) -> dict[str, Any]:
    requests = dict.fromkeys(ROWS, 100 if options.quick else 20_000)
    requests["none"] = 2_000 if options.quick else 200_000

    async def measure(running: list[Contestant]) -> list[dict[str, Any]]:
        return await measure_memory(running, requests)

    found = asyncio.run(_with_contest(url, options.only, measure))
    print_memory(found)
    return {"memory": found}


async def _with_contest(url: str, only: list[str], measure: Callable[..., Awaitable[Any]]) -> Any:
    async with contest(url, only) as running:
        return await measure(running)


if __name__ == "__main__":
    main()
