"""HTTP/2: many requests on one connection, clients that leave one of them, and closed windows."""

import pytest

from tests.server.clients import PATIENCE
from tests.server.servers import HTTP2

pytestmark = pytest.mark.once


@pytest.fixture(scope="module", params=HTTP2, ids=str)
def http2_server(request, serve):
    """Each server in turn: one process for this file, as some requests may never end in it."""
    with serve(request.param) as served:
        yield served


@pytest.fixture
def http2(http2_server, stored):
    """Each server in turn; nothing has been told yet, and nothing is stored."""
    http2_server.forget()
    yield http2_server
    if http2_server.server.returns_from_send:
        http2_server.wait_until_idle()
    http2_server.disconnect()


# --------------------------------------------------------------------------------------
# Many requests
# --------------------------------------------------------------------------------------


def test_requests_of_one_connection_have_a_session_each(http2, stored):
    """G11, G12: twenty at once on a pool of five, some before their first use of the session, some
    after it: each has a context, a transaction and a row of its own, and the one that is refused
    takes no other with it.
    """
    waiting = [f"/asyncpg/between/{number}" for number in range(1, 6)]
    slow = [f"/asyncpg/slow/{number}" for number in range(6, 11)]
    others = [f"/asyncpg/items/{number}" for number in range(11, 20)]
    with http2.connect() as client:
        client.send_all(*(("GET", path) for path in waiting), *(("POST", path) for path in slow))
        http2.wait_for("waiting", count=5)
        http2.wait_for("written", count=5)
        assert 5 == http2.checked_out()
        client.send_all(*(("POST", path) for path in [*others, "/asyncpg/refused/20"]))
        http2.wait_for("called", "/asyncpg/refused/20")
        for name in [*(f"deaf/{number}" for number in range(1, 6)), *(each[9:] for each in slow)]:
            http2.allow(name)
        statuses = [client.head()[0] for _ in range(20)]

    assert [200] * 5 + [201] * 14 + [409] == statuses
    http2.wait_for("ended", count=20)
    assert (list(range(1, 20)), 0) == (stored.ids(), http2.checked_out())
    order = ["checkout", "begin", "commit", "checkin"]
    told = [http2.told(path) for path in [*waiting, *slow, *others]]
    assert [order] * 19 == [[what for what in each if what in order] for each in told]


def test_only_the_request_waits_whose_commit_is_not_answered(http2, stored):
    """G1: while one COMMIT is held its client has nothing of that response, and all of another."""
    with http2.connect() as client:
        with stored.holding_commits():
            client.send("POST", "/asyncpg/held/1")
            stored.wait_for_held_commit()
            client.send("POST", "/asyncpg/items/2")
            status, headers = client.head(of=1)
            assert (201, b'{"id":2}') == (status, client.body(headers))
            assert [2] == stored.ids()
            assert not client.has_bytes()
        assert (201, [1, 2]) == (client.head()[0], stored.ids())


# --------------------------------------------------------------------------------------
# A body that nobody reads
# --------------------------------------------------------------------------------------


def test_closed_windows_hold_no_connection(http2, stored):
    """G6: bodies that wait for room wait without the database, and others are answered. A server
    that holds nobody up takes all that the app has, and lets it wait with the last piece; whoever
    doesn't listen is left waiting when the stream is reset.
    """
    with http2.connect() as client:
        client.send_all(("GET", "/asyncpg/large/1"), ("GET", "/asyncpg/large-stream/2"))
        assert [200, 200] == [client.head()[0], client.head()[0]]
        assert ([1, 2], 0) == (stored.ids(), http2.checked_out())
        assert (201, b'{"id":3}') == client.request("POST", "/asyncpg/items/3")
        if http2.server.holds_up_the_app:
            assert "last body" not in http2.told("/asyncpg/large-stream/2")
        else:
            http2.wait_for("last body", "/asyncpg/large-stream/2")
        assert "ended" not in http2.told("/asyncpg/large-stream/2")
        client.leave_all()
        http2.wait_for("ended", "/asyncpg/large-stream/2")
        assert (201, b'{"id":4}') == client.request("POST", "/asyncpg/items/4")
        if http2.server.returns_from_send:
            http2.wait_for("ended", "/asyncpg/large/1")
        else:
            assert "ended" not in http2.told("/asyncpg/large/1")


def test_client_that_leaves_a_body_behind_a_closed_window(http2, stored):
    """G7: what such a body has written is rolled back when its stream is reset; the other requests
    of the connection don't notice.
    """
    path = "/asyncpg/heavy/1"
    with http2.connect() as client:
        client.send("GET", path)
        assert 200 == client.head()[0]
        http2.wait_for("written")
        assert (1, []) == (http2.checked_out(), stored.ids())
        client.leave()
        assert (201, b'{"id":2}') == client.request("POST", "/asyncpg/items/2")
    http2.wait_for("ended", path)
    assert ([2], 0) == (stored.ids(), http2.checked_out())


# --------------------------------------------------------------------------------------
# One request's fault, and the others of its connection
# --------------------------------------------------------------------------------------


def test_torn_body_takes_no_other_request_with_it(http2, stored):
    """G7: the client never sees the clean end of a body whose COMMIT failed: the stream is reset,
    or goes on without an end, and the next request on the connection is answered.
    """
    with http2.connect() as client:
        client.send("GET", "/asyncpg/torn/1")
        assert 200 == client.head()[0]
        assert b"line\n" == client.chunk()
        assert "IntegrityError" == http2.wait_for("ended", "/asyncpg/torn/1").more["error"]
        is_reset = http2.server.closes_torn_bodies
        assert is_reset == client.has_ended(PATIENCE if is_reset else 0.2)
        assert "last body" not in http2.told("/asyncpg/torn/1")
        assert (201, b'{"id":2}') == client.request("POST", "/asyncpg/items/2")
    assert ([2], 0) == (stored.ids(), http2.checked_out())


def test_body_that_comes_after_its_answer(http2, stored):
    """G3, G10: it is nobody's, or every request that is under way on the connection is cancelled: a
    handler is rolled back and its client gets a 500, a COMMIT that was sent is waited for and told.
    """
    goes_on = http2.server.outlives_late_bodies
    with http2.connect() as client:
        with stored.holding_commits():
            client.send("POST", "/asyncpg/slow/24")
            client.send("POST", "/asyncpg/held/7")
            stored.wait_for_held_commit()
            http2.wait_for("written")
            client.send("POST", "/asyncpg/items/8", body=b"123", length=10)
            assert 201 == client.head(of=2)[0]
            http2.wait_for("ended", "/asyncpg/items/8")
            client.go_on(b"4567")
            if goes_on:
                client.wait_until_seen()
                http2.allow("slow/24")
            http2.wait_for("ended", "/asyncpg/slow/24")
        statuses = [client.head()[0], client.head()[0]]
    assert [201 if goes_on else 500, 201] == statuses
    assert ([7, 8, 24] if goes_on else [7, 8], 0) == (stored.ids(), http2.checked_out())
    errors = [http2.wait_for("ended", f"/asyncpg/{path}") for path in ("slow/24", "held/7")]
    assert [None if goes_on else "CancelledError"] * 2 == [each.more["error"] for each in errors]


def test_body_that_its_app_does_not_read(http2, stored):
    """G3, G14: it holds up nobody, or all that comes behind it on the connection, for good: bodies,
    requests, and that the client has left. Then it takes a `timeout` to end the transactions of
    those who wait.
    """
    is_read_past = http2.server.reads_past_unread_bodies
    upload = f"/asyncpg/{'upload' if is_read_past else 'timed-upload'}/1"
    with http2.connect() as client:
        client.send("POST", upload, length=1)
        http2.wait_for("written", upload)
        client.send("POST", "/asyncpg/slow/25", length=20)
        http2.wait_for("written", "/asyncpg/slow/25")
        for _ in range(20):
            client.go_on(b"x")
        client.send("POST", "/asyncpg/items/3")
        if is_read_past:
            assert 201 == client.head(of=2)[0]
            client.leave_all()
        http2.allow("slow/25")
        http2.wait_for("last body", "/asyncpg/slow/25")
        client.drop()
    http2.wait_for("rollback", upload)
    http2.wait_for("checkin", upload)
    assert ([3, 25] if is_read_past else [25], 0) == (stored.ids(), http2.checked_out())
    assert is_read_past == ("called" in http2.told("/asyncpg/items/3"))


# --------------------------------------------------------------------------------------
# The end of the connection
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "item_id"), [("go_away", 26), ("drop", 27)])
def test_connection_that_ends_with_requests_under_way(http2, stored, end, item_id):
    """G3, G7, G10: each ends as if it had been alone: the handler and the COMMIT go on and are
    committed, the body that never came and the stream are rolled back, and no connection is kept.
    A server may leave an app waiting for good that sends its last piece to nobody.
    """
    handler, endless, upload = f"/asyncpg/slow/{item_id}", "/asyncpg/endless/3", "/asyncpg/upload/2"
    with http2.connect() as client, stored.holding_commits():
        client.send("POST", "/asyncpg/held/4")
        stored.wait_for_held_commit()
        client.send("POST", handler)
        client.send("GET", endless)
        client.send("POST", upload, length=10)
        for path in (handler, endless, upload):
            http2.wait_for("written", path)
        getattr(client, end)()
        http2.wait_for("checkin", upload)
        http2.wait_for("ended", endless)
    http2.allow(f"slow/{item_id}")
    returns = http2.server.returns_from_send
    for path in (handler, "/asyncpg/held/4", upload):
        http2.wait_for("ended" if returns else "last body", path)
    assert ([3, 4, item_id], 0) == (stored.ids(), http2.checked_out())
    assert (201, b'{"id":5}') == http2.connect().request("POST", "/asyncpg/items/5")
    assert returns == ("ended" in http2.told(handler))
