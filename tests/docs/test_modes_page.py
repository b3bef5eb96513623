"""Modes and options: each example does what the page says."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from asgi_dbscope import LateOptionsError, NoSessionScopeError, StreamSessionError
from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"
TEA = {"item": "tea"}
APP = ("tutorial.md/tables", "app")

Raised = Callable[[Any], list[BaseException]]


@pytest.fixture
def watch() -> Any:
    """Wrap an app: what it raises is kept in `errors`."""

    class Watched:
        def __init__(self, app):
            self.app = app
            self.errors = []

        async def __call__(self, scope, receive, send):
            try:
                await self.app(scope, receive, send)
            except ExceptionGroup as group:  # older Starlettes stream in a task group
                self.errors.extend(group.exceptions)
                raise
            except Exception as error:
                self.errors.append(error)
                raise

    return Watched


@runs("modes.md", *APP, "autocommit")
async def test_autocommit_keeps_what_was_written_before_an_error(example, serve, query):
    """In mode `autocommit` each statement is durable, and a real transaction is one."""
    async with serve(example.app) as client:
        statuses = [
            (await client.post("/imports", params={"items": "a,b,,c"})).status_code,
            (await client.post("/pairs", params={"first": "x", "second": ""})).status_code,
            (await client.post("/pairs", params={"first": "y", "second": "z"})).status_code,
        ]

    assert [422, 422, 200] == statuses
    assert ["a", "b", "y", "z"] == query(ORDERS)


@runs("modes.md", *APP, "autocommit")
async def test_manual_mode_keeps_only_what_was_committed(example, serve, query, caplog):
    """In mode `manual` nothing is committed by itself, and the log names who lost something."""
    async with serve(example.app) as client:
        await client.post("/drafts", params={"item": "kept", "keep": True})
        await client.post("/drafts", params={"item": "lost", "keep": False})

    (record,) = (each for each in caplog.records if each.name == "asgi_dbscope")
    assert logging.WARNING == record.levelno
    assert "POST /drafts" in record.getMessage()
    assert ["kept"] == query(ORDERS)


@runs("modes.md", *APP, "read-only")
async def test_read_only_is_enforced_by_the_database(example, serve, query):
    """G20: a read-only endpoint reads, cannot write, and leaves the next request alone."""
    async with serve(example.app) as client:
        assert 200 == (await client.get("/report")).status_code
        assert 500 == (await client.get("/careless-report")).status_code
        async with example.db.session_scope() as session:
            session.add(example.Order(item="tea"))
        assert ["tea"] == (await client.get("/report")).json()


@runs("modes.md", *APP, "apply")
async def test_options_have_to_come_before_the_first_use(example, serve, watch):
    """Options after the first use are a LateOptionsError; applied ahead of it they hold."""
    watched = watch(example.app)
    async with serve(watched) as client:
        late = await client.get("/late")
        early = await client.get("/early")

    assert (500, 200) == (late.status_code, early.status_code)
    assert [LateOptionsError] == [type(error) for error in watched.errors]


@runs("modes.md", *APP, "policy")
async def test_policy_of_an_endpoint_decides(example, serve, query):
    """G3: an endpoint's commit policy decides from the response head."""
    async with serve(example.app) as client:
        await client.post("/told", params={"item": "kept", "discard": False})
        await client.post("/told", params={"item": "discarded", "discard": True})
        await client.post("/strict", params=TEA)

    assert ["kept"] == query(ORDERS)


@runs("modes.md", *APP, "stream")
async def test_stream_policies(example, serve, query, watch):
    """G7: `hold` reads a server-side cursor, `release` commits with the body, `error` refuses."""
    watched = watch(example.app)
    async with serve(watched) as client:
        followed = await client.get("/follow")
        exported = await client.get("/export")
        await client.get("/strict-stream")

    assert "0\n1\n2\n" == followed.text
    assert "line 0\nline 1\nline 2\n" == exported.text
    assert ["line 0", "line 1", "line 2"] == query(ORDERS)
    assert [StreamSessionError] == [type(error) for error in watched.errors]


@runs("modes.md", *APP, "commit-error")
async def test_failed_commit_is_answered_by_the_option(example, serve, query):
    """G2: `commit_error_response` answers where the transaction could not be committed."""
    async with serve(example.guarded) as client:
        response = await client.post("/orders")

    assert (409, {"detail": "that conflicts with other data"}) == (
        response.status_code,
        response.json(),
    )
    assert [] == query(ORDERS)


@runs("modes.md", *APP, "exclude")
async def test_excluded_path_has_no_session(example, serve, watch):
    """A path that is excluded gets no session scope."""
    watched = watch(example.bare)
    async with serve(watched) as client:
        assert 500 == (await client.get("/health")).status_code

    assert [NoSessionScopeError] == [type(error) for error in watched.errors]


@runs("modes.md", *APP, "several")
async def test_several_databases_in_one_request(example, serve, query):
    """G1: two databases are both committed before the response."""
    async with serve(example.both) as client:
        assert 200 == (await client.post("/orders", params=TEA)).status_code

    assert ["tea"] == query(ORDERS)
    async with example.reports.session_scope() as session:
        found = await session.scalars(example.text("SELECT item FROM report"))
        assert ["tea"] == list(found)
