"""Where a task is waiting: the innermost line of the user's."""

import asyncio
import types

from asgi_dbscope._places import place_of_task


async def test_running_task_waits_nowhere_but_here():
    """A task that is not suspended is at the line of its own function."""
    place = place_of_task(asyncio.current_task())

    assert place is not None
    assert "test_running_task_waits_nowhere_but_here()" == place.function
    assert str(place).endswith(f"(unit/test_places.py:{place.line})")


async def test_generator_that_is_awaited_is_seen_through():
    """Old coroutines, made of generators, have frames as well."""
    wakes = asyncio.get_running_loop().create_future()

    @types.coroutine
    def old():
        yield from wakes

    async def new():
        await old()

    task = asyncio.create_task(new())
    await asyncio.sleep(0)
    place = place_of_task(task)
    wakes.set_result(None)
    await task

    assert place is not None
    assert place.function.endswith("<locals>.old()")


def test_nobody_is_nowhere():
    """Where no task is known there is no place."""
    assert place_of_task(None) is None
