"""The response's transaction, message by message."""

import sqlalchemy as sa

from asgi_dbscope import DBSessionMiddleware
from tests.fix_asgi import body, start
from tests.fix_database import Child, Item


async def test_commits_before_the_head(db, drive, rows, timeline):
    """G1, G6: COMMIT is answered and the connection is back before the head goes out."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        await send(body(b"ok"))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == timeline
    assert [1] == await rows()
    assert exchange.error is None


async def test_failed_commit_is_never_a_success(db, drive, rows, timeline):
    """G2: a COMMIT that fails is rolled back, the head isn't sent, the error surfaces."""
    ran = []

    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        await send(start(200))
        await send(body(b"ok"))
        ran.append("background")

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == exchange.messages
    assert [] == ran
    assert "was rolled back" in exchange.error.__notes__[0]
