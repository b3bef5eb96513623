"""Jobs, consumers and scripts: each example does what the page says."""

import asyncio

import pytest
from dramatiq import Worker
from faststream.rabbit import TestRabbitBroker
from faststream.rabbit import message as rabbit_message

from asgi_dbscope import RollbackOnlyError
from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"
TEA = {"item": "tea"}
APP = ("tutorial.md/tables", "app")


@runs("jobs.md", *APP, "script")
async def test_script_commits_all_or_nothing(example, query):
    """G4: functions join the script's transaction; one that failed rolls back all of them."""
    async with example.lifespan(None):
        await example.main(["tea", "coffee"])
        await example.import_order("cake")
        with pytest.raises(ValueError, match="an order of nothing"):
            await example.main(["lost", ""])
        with pytest.raises(RollbackOnlyError):
            async with example.db.session_scope():
                await example.import_order("lost")
                with pytest.raises(ValueError, match="an order of nothing"):
                    await example.import_order("")

    assert ["tea", "coffee", "cake"] == query(ORDERS)


@runs("jobs.md", *APP, "faststream")
async def test_faststream_handler_publishes_what_is_committed(example, query):
    """G1: what the handler returns is published after its transaction was committed."""
    published = []

    @example.broker.subscriber("placed")
    async def placed(number: int) -> None:
        published.append((number, query(ORDERS)))

    async with example.lifespan(None), TestRabbitBroker(example.broker) as broker:
        await broker.publish("tea", "orders")

    assert [(1, ["tea"])] == published


@runs("jobs.md", *APP, "faststream", "faststream-manual")
async def test_faststream_message_is_answered_by_hooks(example, query, monkeypatch):
    """G1, G3: a message is acknowledged by a hook when it is committed, else refused."""
    answers = []

    async def ack(message):
        answers.append(("ack", query(ORDERS)))

    async def nack(message):
        answers.append(("nack", query(ORDERS)))

    monkeypatch.setattr(rabbit_message.RabbitMessage, "ack", ack)
    monkeypatch.setattr(rabbit_message.RabbitMessage, "nack", nack)
    async with example.lifespan(None), TestRabbitBroker(example.broker) as broker:
        await broker.publish("tea", "returns")
        monkeypatch.setattr(example, "Order", lambda item: example.Base(item=item))
        with pytest.raises(TypeError):
            await broker.publish("coffee", "returns")

    assert [("ack", ["returned: tea"]), ("nack", ["returned: tea"])] == answers


@runs("jobs.md", *APP, "taskiq", "deferred")
async def test_job_is_enqueued_when_the_request_is_committed(example, serve, query):
    """G1: the job that a request enqueues finds the request's row."""
    async with serve(example.app) as client:
        response = await client.post("/orders", params=TEA)
        await example.tasks.wait_all()

    assert (201, {"id": 1}) == (response.status_code, response.json())
    assert ["tea", "receipt for tea"] == query(ORDERS)


@runs("jobs.md", *APP, "dramatiq")
async def test_actor_has_a_scope_of_its_own(example, query, capsys):
    """G1: an actor's transaction is committed, and then the next one is sent for."""
    async with example.lifespan(None):
        async with example.db.session_scope() as session:
            session.add(example.Order(item="tea"))
        worker = Worker(example.queue, worker_timeout=50, worker_threads=1)
        worker.start()
        try:
            example.pack.send(1)
            await asyncio.to_thread(example.queue.join, "default", timeout=60_000)
        finally:
            await asyncio.to_thread(worker.stop)
            example.worker_engine.dispose()

    assert ["tea", "parcel with tea"] == query(ORDERS)
    assert "tea\n" == capsys.readouterr().out
