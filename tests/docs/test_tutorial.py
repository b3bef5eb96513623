"""README and tutorial: every code block runs, and does what the text beside it says."""

import logging

import pytest
from sqlalchemy.exc import IntegrityError

from tests.docs.blocks import ROOT, runs

ORDERS = "SELECT item FROM orders"
TEA = {"item": "tea"}


@runs("README.md", "orders")
async def test_readme_commits_an_order(example, serve, query):
    """G1: the README's example answers 201, and the row is there."""
    async with serve(example.app) as client:
        response = await client.post("/orders", params=TEA)

    assert (201, {"id": 1}) == (response.status_code, response.json())
    assert ["tea"] == query(ORDERS)


@runs("tutorial.md", "tables", "fastapi")
async def test_tutorial_places_and_shows_an_order(example, serve, query):
    """G1, G3: the tutorial's FastAPI app writes, reads, and answers 404 where nothing is."""
    async with serve(example.app) as client:
        placed = await client.post("/orders", params=TEA)
        found = await client.get("/orders/1")
        missing = await client.get("/orders/2")

    assert (201, {"id": 1}) == (placed.status_code, placed.json())
    assert (200, {"item": "tea"}) == (found.status_code, found.json())
    assert 404 == missing.status_code
    assert ["tea"] == query(ORDERS)


@runs("tutorial.md", "tables", "depends")
async def test_tutorial_hands_the_session_to_fastapi(example, serve, query):
    """G11: the session from `Depends(db.get_session)` is the one that is committed."""
    async with serve(example.app) as client:
        assert 201 == (await client.post("/orders", params=TEA)).status_code

    assert ["tea"] == query(ORDERS)


@runs("tutorial.md", "tables", "starlette")
async def test_tutorial_runs_under_starlette(example, serve, query):
    """G1: the tutorial's Starlette app commits."""
    async with serve(example.app) as client:
        assert 201 == (await client.post("/orders", params=TEA)).status_code

    assert ["tea"] == query(ORDERS)


@runs("tutorial.md", "tables", "litestar")
async def test_tutorial_runs_under_litestar(example, serve, query):
    """G1: the tutorial's Litestar app commits."""
    async with serve(example.app) as client:
        assert 201 == (await client.post("/orders", params=TEA)).status_code

    assert ["tea"] == query(ORDERS)


@runs("tutorial.md", "tables", "wrapped")
async def test_tutorial_wraps_quart(example, serve, query):
    """G1: an app that is wrapped whole, Quart's, commits."""
    async with example.lifespan(None), serve(example.app) as client:
        assert 201 == (await client.post("/orders/tea")).status_code

    assert ["tea"] == query(ORDERS)


@runs("tutorial.md", "tables", "fastapi", "service")
async def test_tutorial_shares_the_session_with_services(example, serve, query):
    """G11: a service sees what the same request has flushed and not yet committed."""
    async with serve(example.app) as client:
        await client.post("/orders", params=TEA)
        response = await client.post("/orders/counted", params=TEA)

    assert (201, {"orders": 2}) == (response.status_code, response.json())
    assert ["tea", "tea"] == query(ORDERS)


@runs("tutorial.md", "tables", "fastapi", "raises")
async def test_tutorial_tells_raised_from_returned(example, serve, query):
    """G3: a 409 that is raised leaves no row, a 409 that is returned leaves one."""
    async with serve(example.app) as client:
        raised = await client.post("/orders/raising", params={"item": "raised"})
        returned = await client.post("/orders/returning", params={"item": "returned"})

    assert (409, 409) == (raised.status_code, returned.status_code)
    assert ["returned"] == query(ORDERS)


@runs("tutorial.md", "tables", "fastapi", "deferred")
async def test_tutorial_answers_500_where_commit_fails(example, serve, query, caplog):
    """G2: a COMMIT that fails is a 500 without a row or a mail, and the log has the note."""
    mails = []
    example.send_mail = lambda: mails.append("sent")
    raised = []
    app = example.app

    async def watched(scope, receive, send):
        try:
            await app(scope, receive, send)
        except IntegrityError as error:
            raised.append(error.__notes__)
            raise

    async with serve(watched) as client:
        refused = await client.post("/lines", params={"order_id": 404})
        await client.post("/orders", params=TEA)
        added = await client.post("/lines", params={"order_id": 1})

    assert (500, 201) == (refused.status_code, added.status_code)
    assert [["asgi_dbscope: the transaction of POST /lines was rolled back."]] == raised
    assert ["sent"] == mails
    assert [1] == query("SELECT order_id FROM lines")


@runs("tutorial.md", "tables", "fastapi", "deferred", "handler")
async def test_tutorial_renders_a_failed_commit(example, serve, query):
    """G2: the app's own exception handler answers where COMMIT failed."""
    async with serve(example.app) as client:
        refused = await client.post("/lines", params={"order_id": 404})

    assert (409, "that conflicts with other data") == (
        refused.status_code,
        refused.json()["detail"],
    )
    assert [] == query("SELECT order_id FROM lines")


@runs("tutorial.md", "tables", "fastapi", "deferred", "handler", "savepoint")
async def test_tutorial_heals_an_expected_error_by_a_savepoint(example, serve, query):
    """G21: a second insert is undone to its savepoint, and the request commits."""
    async with serve(example.app) as client:
        first = await client.put("/orders/7", params=TEA)
        second = await client.put("/orders/7", params={"item": "coffee"})

    assert (201, {"detail": "placed"}) == (first.status_code, first.json())
    assert (201, {"detail": "it was there already"}) == (second.status_code, second.json())
    assert ["tea"] == query(ORDERS)


@runs("tutorial.md", "tables", "fastapi", "service", "preview")
async def test_tutorial_previews(example, serve, query):
    """G4: a preview answers 200 with an id, and leaves no row."""
    async with serve(example.app) as client:
        response = await client.post("/orders/preview", params=TEA)

    assert (200, {"id": 1}) == (response.status_code, response.json())
    assert [] == query(ORDERS)


@runs("tutorial.md", "tables", "fastapi", "service", "job")
async def test_tutorial_runs_a_job(example, query, capsys):
    """G11: services work in a job of its own, which commits as a whole."""
    async with example.engine.begin() as connection:
        await connection.run_sync(example.Base.metadata.create_all)

    await example.main()

    assert "['tea', 'coffee']" == capsys.readouterr().out.strip()
    assert ["tea", "coffee"] == query(ORDERS)


@runs("tutorial.md", "tables", "fastapi", "service", "job")
async def test_tutorial_job_that_raises_leaves_nothing(example, query):
    """G3: a job that raises halfway is rolled back as a whole."""
    async with example.engine.begin() as connection:
        await connection.run_sync(example.Base.metadata.create_all)

    with pytest.raises(IntegrityError):
        await example.import_orders(["tea", None])

    assert [] == query(ORDERS)


@runs("tutorial.md", "tables", "fastapi", "service", "job", "test")
async def test_tutorial_tests_its_app(example):
    """The tutorial's own test passes."""
    async with example.lifespan(None):
        await example.test_order_is_placed()


@runs("tutorial.md", "tables", "depends", "lifecycle.md/debug-log")
async def test_log_shows_each_step(example, serve, caplog):
    """The debug log of a request is the one that the lifecycle's page shows."""
    try:
        async with serve(example.app) as client:
            await client.post("/orders", params=TEA)
    finally:
        logging.getLogger("asgi_dbscope").setLevel(logging.NOTSET)
    lines = [each.message for each in caplog.records if each.name == "asgi_dbscope"]

    assert 4 == len(lines)
    assert "\n".join(lines) in (ROOT / "docs" / "lifecycle.md").read_text()
