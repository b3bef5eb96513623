"""Security: each example does what the page says."""

import sqlalchemy as sa

from tests.docs.blocks import runs

SECRET = "s3cr3t"


@runs("security.md", "hide", "app")
async def test_client_and_log_read_no_values(example, serve, caplog):
    """G2: the handler's answer is all that a client reads; the log has the SQL, and no values."""

    @example.app.post("/orders")
    async def place(item: str) -> None:
        statement = sa.text("INSERT INTO nowhere VALUES (:item)")
        await example.db.session.execute(statement, {"item": item})

    async with serve(example.app) as client:
        response = await client.post("/orders", params={"item": SECRET})

    assert (409, {"detail": "This can't be saved as it is."}) == (
        response.status_code,
        response.json(),
    )
    told = [caplog.handler.format(each) for each in caplog.records if each.name != "httpx"]
    assert SECRET not in "".join(told)
