"""Hooks: each example of the page does what the page says."""

from typing import Any

import pytest

from asgi_dbscope import Database, Outcome
from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"
TEA = {"item": "tea"}
APP = ("tutorial.md/tables", "app")


@runs("hooks.md", *APP, "call")
async def test_mail_goes_out_after_the_commit_and_before_the_response(
    example, serve, query, monkeypatch
):
    """G1: what an on-commit hook tells of is committed by then."""
    committed = []

    async def send_mail(text):
        committed.append((text, query(ORDERS)))

    monkeypatch.setattr(example, "send_mail", send_mail)
    async with serve(example.app) as client:
        response = await client.post("/orders", params=TEA)

    assert 201 == response.status_code
    assert [("order 1 is placed", ["tea"])] == committed


@runs("hooks.md", *APP, "call")
async def test_no_mail_goes_out_of_a_rollback(example, serve):
    """A transaction that is rolled back runs no on-commit hook."""
    async with serve(example.app):
        with pytest.raises(ZeroDivisionError):
            async with example.db.session_scope():
                await example.place("tea")
                raise ZeroDivisionError

    assert [] == example.outbox


@runs("hooks.md", *APP, "decorator")
async def test_decorated_hooks_run_in_their_time(example, serve):
    """An after-response hook runs behind those of before the response, whatever was first."""
    async with serve(example.app) as client:
        await client.post("/orders/announced", params=TEA)

    assert ["COMMITTED", "webhook: tea"] == example.outbox


@runs("hooks.md", *APP, "savepoint")
async def test_hook_under_a_savepoint_goes_with_it(example, serve, query):
    """An on-commit hook of a NESTED block that is rolled back is dropped."""
    async with serve(example.app) as client:
        response = await client.post("/orders/with-extra", params=TEA)

    assert 200 == response.status_code
    assert ["tea", "no extra"] == example.outbox
    assert ["tea"] == query(ORDERS)


@runs("hooks.md", *APP, "database")
async def test_hook_writes_in_a_transaction_of_its_own(example, serve, query):
    """What a hook writes after a rollback is committed."""
    async with serve(example.app) as client:
        response = await client.post("/orders/audited", params=TEA)

    assert 500 == response.status_code
    assert ["failed: tea"] == query(ORDERS)


@runs("hooks.md", *APP, "raise")
async def test_hook_that_raises_becomes_the_response(example, serve, query):
    """With `on_error="raise"` the client gets an error; the transaction stays committed."""
    async with serve(example.app) as client:
        response = await client.post("/orders/told", params=TEA)

    assert 500 == response.status_code
    assert ["tea"] == query(ORDERS)
    assert ["tea"] == example.outbox


@runs("hooks.md", *APP, "raise")
async def test_hook_that_raises_says_what_became_of_the_transaction(example, serve):
    """The error of a hook has a note with the transaction's outcome."""
    async with serve(example.app):
        with pytest.raises(ConnectionError) as raised:
            async with example.db.session_scope():
                await example.told("tea")

    [note] = raised.value.__notes__
    assert "COMMITTED" in note


@runs("hooks.md", *APP)
async def test_hook_that_fails_is_logged_and_the_others_run(example, serve, caplog):
    """By default an error of a hook is a line of the log."""
    async with serve(example.app), example.db.session_scope():
        example.db.on_commit(int, "no number")
        example.db.on_commit(example.send_mail, "the next one")

    assert ["the next one"] == example.outbox
    assert "the hook int failed; the others run" in caplog.text


@runs("hooks.md", *APP)
async def test_hooks_of_mid_request_run_with_what_ends_their_transaction(example, serve):
    """`session.commit()`, `session.rollback()` and `release()` run the hooks there and then."""
    seen: list[object] = []
    async with serve(example.app), example.db.session_scope() as session:
        example.db.on_completion(seen.append)
        await session.commit()
        after_commit = list(seen)
        example.db.on_completion(seen.append)
        await session.rollback()
        after_rollback = list(seen)
        example.db.on_completion(seen.append)
        await example.db.release()

        assert [Outcome.COMMITTED] == after_commit
        assert [Outcome.COMMITTED, Outcome.ROLLED_BACK] == after_rollback
        assert [Outcome.COMMITTED, Outcome.ROLLED_BACK, Outcome.COMMITTED] == seen


@runs("hooks.md", *APP)
async def test_hooks_of_mode_manual_follow_your_commit(example, serve):
    """In mode manual a hook waits for your own `commit()`."""
    async with serve(example.app), example.db.session_scope(mode="manual") as session:
        session.add(example.Order(item="tea"))
        example.db.on_commit(example.send_mail, "tea")
        before = list(example.outbox)
        await session.commit()

        assert [] == before
        assert ["tea"] == example.outbox


@pytest.mark.parametrize("mode", ["autocommit", None])
@runs("hooks.md", *APP)
async def test_hooks_outside_of_a_transaction_run_at_once(example, serve, mode):
    """Outside of a transaction on-commit hooks run at once, and on-rollback hooks never."""
    seen: list[object] = []

    def register(database: Database[Any]) -> None:
        database.on_commit(seen.append, "commit")
        database.on_rollback(seen.append, "rollback")
        database.on_completion(seen.append)

    async with serve(example.app):
        if mode is None:
            register(example.db)
        else:
            async with example.db.session_scope(mode=mode):
                register(example.db)

    assert ["commit", Outcome.NOT_BEGUN] == seen


@runs("hooks.md", *APP)
async def test_coroutine_function_that_runs_at_once_is_waited_for(example, serve):
    """The end of the session scope waits for hooks that run as tasks."""
    async with serve(example.app):
        async with example.db.session_scope(mode="autocommit"):
            example.db.on_commit(example.send_mail, "tea")

        assert ["tea"] == example.outbox
