"""Clients that leave: what the server does, and what becomes of the transaction."""

import pytest

from tests.fix_served import ON_HTTP1
from tests.server.clients import PATIENCE, Torn

# --------------------------------------------------------------------------------------
# Before the head
# --------------------------------------------------------------------------------------


def test_client_that_leaves_before_its_body_is_read(served, stored):
    """G3: the app that waits for the body gets an error, and what it wrote is rolled back. A
    server that reads the body first doesn't call the app at all.
    """
    path = "/asyncpg/upload/1"
    with served.connect() as client:
        client.send("POST", path, body=b"123", length=10)
        if served.server.calls_before_body:
            served.wait_for("written")
        client.leave()
    if served.server.calls_before_body:
        assert "ClientDisconnect" == served.wait_for("ended", path).more["error"]
    with served.connect() as client:
        assert 200 == client.request("GET", "/asyncpg/ping")[0]
    assert served.server.calls_before_body == ("called" in served.told(path))
    assert ([], 0) == (stored.ids(), served.checked_out())


def test_client_that_leaves_while_the_handler_works(served, stored):
    """G9: the handler runs to its end and is committed, as if the client had waited."""
    path = "/asyncpg/slow/2"
    with served.connect() as client:
        client.send("POST", path)
        served.wait_for("written")
        client.leave()
    with served.connect() as client:  # by then the server has seen the other go
        assert 200 == client.request("GET", "/asyncpg/ping")[0]
    served.allow("slow/2")
    assert None is served.wait_for("ended", path).more["error"]
    assert ([2], 0) == (stored.ids(), served.checked_out())


def test_client_that_leaves_during_commit(served, stored):
    """G10: the COMMIT that was sent is waited for."""
    path = "/asyncpg/held/3"
    with served.connect() as client, stored.holding_commits():
        client.send("POST", path)
        stored.wait_for_held_commit()
        client.leave()
        with served.connect() as other:
            assert 200 == other.request("GET", "/asyncpg/ping")[0]
    assert None is served.wait_for("ended", path).more["error"]
    assert ([3], 0) == (stored.ids(), served.checked_out())


@ON_HTTP1
def test_client_that_only_ends_its_half(served, stored):
    """G1: a client that sends no more is answered by some servers, and gone for others; what the
    handler wrote is committed either way.
    """
    path = "/asyncpg/slow/4"
    with served.connect() as client:
        client.send("POST", path)
        served.wait_for("written")
        client.end_requests()
        with served.connect() as other:
            assert 200 == other.request("GET", "/asyncpg/ping")[0]
        served.allow("slow/4")
        served.wait_for("ended", path)
        try:
            status = client.head()[0]
        except Torn:
            status = None
    assert (201 if served.server.answers_half_closed else None) == status
    assert ([4], 0) == (stored.ids(), served.checked_out())


# --------------------------------------------------------------------------------------
# After the head
# --------------------------------------------------------------------------------------


def test_head_of_a_stream_goes_out_at_once_or_with_its_first_piece(served, stored):
    """G18: the middleware holds no head; a server that waits for the body's first piece does."""
    path = "/asyncpg/between/5"
    with served.connect() as client:
        client.send("GET", path)
        served.wait_for("waiting")
        at_once = served.server.sends_head_at_once
        assert at_once == client.has_bytes(PATIENCE if at_once else 0.2)
        served.allow("deaf/5")
        status, headers = client.head()
        assert (200, b"middle\nlast\n") == (status, client.body(headers))
    assert [5] == stored.ids()


@pytest.mark.parametrize("path", ["/asyncpg/between/6", "/asyncpg/deaf/6"])
def test_app_that_does_not_listen_goes_on_without_its_client(served, stored, path):
    """G7: whoever neither receives nor is refused when it sends isn't told that the client left,
    between the head and the body or in the middle of it: the body's transaction is committed.
    """
    with served.connect() as client:
        client.send("GET", path)
        served.wait_for("waiting")
        client.leave()
    with served.connect() as client:
        assert 200 == client.request("GET", "/asyncpg/ping")[0]
    served.allow("deaf/6")
    ended = served.wait_for("ended", path)
    assert (None, [6], 0) == (ended.more["error"], stored.ids(), served.checked_out())
    assert "send raised" not in served.told()


def test_client_that_leaves_in_mid_stream(served, stored):
    """G7: what the stream wrote is rolled back, what came before its head stays."""
    path = "/asyncpg/endless/7"
    with served.connect() as client:
        client.send("GET", path)
        client.head()
        assert b"line\n" == client.chunk()
        assert 1 == served.checked_out()
        client.leave()
    served.wait_for("ended", path)
    assert "received" in served.told(path)
    assert ([7], 0) == (stored.ids(), served.checked_out())
