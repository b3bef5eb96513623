"""The proxy does to a connection what it was armed for, where it was, and else nothing."""

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from bench.proxy import Proxy, after_commit, any_answer, any_query, before_commit
from tests.fix_database import POSTGRES_DRIVERS, Item

pytestmark = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)


@pytest.fixture
async def proxied(proxy):
    """An engine whose connections go through the proxy."""
    engine = create_async_engine(proxy.url)
    yield engine
    assert 0 == engine.pool.checkedout()  # type: ignore[attr-defined]
    await engine.dispose()


async def insert(engine: AsyncEngine, item_id: int) -> None:
    """Write one row, and commit it."""
    async with engine.begin() as connection:
        await connection.execute(sa.insert(Item).values(id=item_id))


@pytest.mark.parametrize("is_tcp", [False, True])
async def test_what_is_not_armed_passes(engine, rows, is_tcp):
    """Statements and large answers arrive, by unix socket and by TCP, and so does an end."""
    async with Proxy(engine.url, tcp=is_tcp) as proxy:
        if is_tcp and proxy.url.drivername.endswith("asyncpg"):
            proxied = create_async_engine(proxy.url, connect_args={"ssl": "prefer"})
        else:
            proxied = create_async_engine(proxy.url)
        await insert(proxied, 1)
        async with proxied.connect() as connection:
            large = await connection.scalar(sa.text("SELECT repeat('x', 3000000)"))
            pid = await connection.scalar(sa.text("SELECT pg_backend_pid()"))
            pids = {link.pid for link in proxy.links}
            with pytest.raises(sa.exc.DBAPIError):
                await connection.execute(sa.select(sa.func.pg_terminate_backend(pid)))
        await proxied.dispose()

    assert [1] == await rows()
    assert 3_000_000 == len(large)
    assert {pid} == pids


@pytest.mark.parametrize(
    ("place", "committed"), [(before_commit, []), (after_commit, [1])], ids=["before", "after"]
)
async def test_swallowed_message_is_never_answered(proxied, proxy, rows, place, committed):
    """The client waits on a connection that stays open; what the server did, it has done."""
    fault = proxy.arm("swallow", place)
    writing = asyncio.create_task(insert(proxied, 1))
    await fault.wait()
    found = await rows()
    [link] = fault.struck
    is_open = link in proxy.links
    link.cut()
    with pytest.raises(sa.exc.DBAPIError):
        await writing
    await insert(proxied, 2)

    assert committed == found
    assert is_open
    assert link not in proxy.links
    assert [*committed, 2] == await rows()


async def test_stalled_message_waits_until_it_is_resumed(proxied, proxy, rows):
    """COMMIT reaches the server when the fault lets it, and the client hears of it."""
    fault = proxy.arm("stall", before_commit)
    writing = asyncio.create_task(insert(proxied, 1))
    await fault.wait()
    before = await rows()
    fault.resume()
    await writing

    assert [] == before
    assert [1] == await rows()


async def test_delayed_message_goes_on_by_itself(proxied, proxy, rows):
    """The answer to COMMIT comes later, and it comes."""
    fault = proxy.arm("delay", after_commit, seconds=0.05)
    begun = asyncio.get_running_loop().time()
    await insert(proxied, 1)

    assert 0.05 <= asyncio.get_running_loop().time() - begun
    assert 1 == len(fault.struck)
    assert [1] == await rows()


@pytest.mark.parametrize("place", [any_query, any_answer])
async def test_fault_happens_at_the_nth_message_of_one_connection(proxied, proxy, place):
    """Messages are counted for each connection; without `times` it happens once."""
    async with proxied.connect() as first, proxied.connect() as second:
        one, _other = sorted(proxy.links, key=lambda link: link.pid)
        fault = proxy.arm("cut", place, nth=20, link=one)
        failed = []
        for connection in (first, second):
            try:
                for _ in range(20):
                    await connection.execute(sa.text("SELECT 1"))
            except sa.exc.DBAPIError:
                failed.append(connection)

    assert [one] == fault.struck
    assert 1 == len(failed)
    assert not fault.is_armed


async def test_server_that_is_down_refuses_new_connections(proxied, proxy, rows):
    """Open connections live on; when it is up again, new ones do too."""
    async with proxied.connect() as connection:
        proxy.is_down = True
        await connection.execute(sa.text("SELECT 1"))
        with pytest.raises(Exception, match=r"closed|reset"):
            await insert(proxied, 1)
        proxy.is_down = False
        await insert(proxied, 2)

    assert [2] == await rows()
