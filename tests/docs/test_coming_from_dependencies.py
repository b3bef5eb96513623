"""Coming with a `yield` dependency around the endpoint: the blocks below it join its block."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI
from litestar import Litestar
from litestar import post as litestar_post
from litestar.di import Provide

from asgi_dbscope import Database, DBSessionMiddleware, TransactionMismatchError
from tests.fix_asgi import body, http_scope, start
from tests.fix_database import Base, Item


@pytest.fixture
def sync_engine(tmp_path) -> Iterator[sa.Engine]:
    """A synchronous engine on the schema of the tests."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'sync.db'}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("fails", [False, True])
async def test_def_dependency_opens_a_block_for_the_endpoint(sync_engine, drive, fails):
    """G11: a service joins the block of a `def` dependency, which ran in another thread."""
    db = Database(sync_engine, mode="autocommit")

    def in_transaction():
        with db.transactional():
            yield

    @db.transactional()
    def place(number):
        db.session.add(Item(id=number))

    app = FastAPI()

    @app.post("/", dependencies=[Depends(in_transaction)])
    def endpoint():
        place(1)
        place(2)
        if fails:
            raise ValueError

    exchange = await drive(DBSessionMiddleware(app, database=db), http_scope("/", "POST"))

    with sync_engine.connect() as connection:
        found = list(connection.scalars(sa.select(Item.id).order_by(Item.id)))
    assert (500, []) == (exchange.status, found) if fails else (200, [1, 2])


# The new spelling is not known to the oldest Litestar that we run.
@pytest.mark.filterwarnings("ignore:.*Inferred dependency field")
async def test_dependency_resolved_in_a_task_of_its_own_opens_a_block(engine, drive, rows):
    """G11: Litestar enters one of two dependencies in a child task; the handler's block joins."""
    db = Database(engine, mode="autocommit")

    async def in_transaction():
        async with db.transactional():
            yield 1

    async def other() -> int:
        return 2

    @db.transactional()
    async def place(number):
        db.session.add(Item(id=number))

    @litestar_post("/", dependencies={"one": Provide(in_transaction), "two": Provide(other)})
    async def handler(one: int, two: int) -> None:
        await place(one)
        await place(two)

    app = DBSessionMiddleware(Litestar([handler]), database=db)
    exchange = await drive(app, http_scope("/", "POST"))

    assert 201 == exchange.status
    assert [1, 2] == await rows()


async def test_requires_new_writes_beside_a_read_only_transaction(db, drive, rows):
    """G20: a block with a transaction of its own has its own demands, not the ones around it."""

    @db.transactional(read_only=True)
    async def count():
        return await db.session.scalar(sa.select(sa.func.count()).select_from(Item))

    async def app(scope, receive, send):
        await count()
        async with db.transactional(propagation="REQUIRES_NEW") as session:
            session.add(Item(id=1))
        await send(start())
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [1] == await rows()


@pytest.mark.parametrize("is_first", [True, False])
async def test_read_only_service_in_a_request_says_what_is_wrong(db, drive, rows, is_first):
    """G20: a write after a read-only service names the service; a read-only one after it too."""

    @db.transactional(read_only=True)
    async def count():
        return await db.session.scalar(sa.select(sa.func.count()).select_from(Item))

    async def app(scope, receive, send):
        if is_first:
            await count()
        db.session.add(Item(id=1))
        await db.session.flush()
        await count()

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, sa.exc.DBAPIError if is_first else TransactionMismatchError)
    said = str(exchange.error) + "".join(getattr(exchange.error, "__notes__", []))
    assert "count() demands" in said or "begun read-only by" in said
    assert [] == await rows()
