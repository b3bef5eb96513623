"""Coming from `get_session`: what goes wrong with two of them, and what one callable does."""

from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"
TABLES = "tutorial.md/tables"
TEA = {"item": "tea"}
GET_SESSION = "coming-from/get-session.md"


@runs(GET_SESSION, TABLES, "before")
async def test_context_manager_is_no_dependency(example, serve, query):
    """`Depends` on an `@asynccontextmanager` function hands over something that is no session."""
    async with serve(example.old_app) as client:
        assert 500 == (await client.post("/orders", params=TEA)).status_code

    assert [] == query(ORDERS)


@runs(GET_SESSION, TABLES, "before")
async def test_two_ways_to_a_session_are_two_transactions(example, serve, query):
    """What a service wrote in a session of its own stays when the endpoint fails."""
    async with serve(example.old_app) as client:
        assert 500 == (await client.post("/gifts", params={"item": ""})).status_code

    assert ["a gift"] == query(ORDERS)


@runs(GET_SESSION, TABLES, "app")
async def test_one_callable_is_one_transaction(example, serve, query):
    """G11: by `Depends` and by `async with`, in an endpoint and its service, it is one session."""
    async with serve(example.app) as client:
        failed = await client.post("/orders", params={"item": ""})
        placed = await client.post("/orders", params=TEA)
        await example.job()

    assert (500, 200) == (failed.status_code, placed.status_code)
    assert ["tea", "wrapping for tea", "wrapping for tea"] == sorted(query(ORDERS))


@runs(GET_SESSION, TABLES, "app", "override")
async def test_dependency_can_be_overridden(example, serve, query):
    """`db.get_session` is found in FastAPI's `dependency_overrides`."""
    async with serve(example.app) as client:
        assert 200 == (await client.post("/orders", params=TEA)).status_code

    assert "seen by the test" in query(ORDERS)
