"""Pytest plugin: after every test, nothing is left over.

The engine's own fixture looks at its pool; warnings (`ResourceWarning`, a connection that was never
checked in, a coroutine never awaited) are errors by configuration. Here: no task, no scope.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from asgi_dbscope import _current
from asgi_dbscope._retry import endpoint_retries


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    """Fail a test that leaves a task of its own running."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, f"tasks left running: {left}"


@pytest.fixture(autouse=True)
def no_scope_is_left() -> object:
    """Fail a test that leaves a session scope set."""
    yield
    assert _current.innermost.get() is None
    return None


@pytest.fixture(autouse=True)
def no_retry_is_left() -> Iterator[None]:
    """Fail a test whose endpoints have a retry that every later request would know of.

    It needs the fixture ``forget_endpoints``.
    """
    yield
    left, endpoint_retries.max_body = endpoint_retries.max_body, None  # for one test to fail by it
    assert left is None
