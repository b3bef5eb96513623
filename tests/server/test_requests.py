"""What is promised of a request, on every server, over a socket, with the database beside it."""

import contextlib
import sqlite3

import pytest

from tests.fix_served import ON_HTTP1, Served, Stored
from tests.server.app import MEGABYTES
from tests.server.clients import Torn

DATABASES = ["asyncpg", "psycopg", "sqlite"]


def ids_of(database: str, served: Served, stored: Stored) -> list[int]:
    """What is committed in one of the app's databases."""
    if database != "sqlite":
        return stored.ids()
    with contextlib.closing(sqlite3.connect(served.file)) as connection:
        return [each for (each,) in connection.execute("SELECT id FROM item ORDER BY id")]


# --------------------------------------------------------------------------------------
# Up to the head
# --------------------------------------------------------------------------------------


def test_no_byte_comes_before_commit_is_answered(served, stored):
    """G1, G6: while the database works on COMMIT the client has nothing; then comes the head, and
    the connection is back before it.
    """
    with served.connect() as client:
        with stored.holding_commits():
            client.send("POST", "/asyncpg/held/1")
            stored.wait_for_held_commit()
            assert not client.has_bytes()
            assert [] == stored.ids()
        status, headers = client.head()
        assert (201, [1]) == (status, stored.ids())
        assert b'{"id":1}' == client.body(headers)

    served.wait_for("ended")
    order = ["called", "checkout", "begin", "commit", "checkin", "head 201", "sent head 201"]
    assert order == served.told()[: len(order)]


@pytest.mark.parametrize("database", DATABASES)
def test_row_is_there_when_the_head_comes(served, stored, database):
    """G1: as the client gets the 201 another connection finds the row."""
    with served.connect() as client:
        client.send("POST", f"/{database}/items/7001")
        status, headers = client.head()
        assert 201 == status
        assert 7001 in ids_of(database, served, stored)
        assert b'{"id":7001}' == client.body(headers)


@pytest.mark.parametrize("database", DATABASES)
def test_failed_commit_is_a_500_and_no_row(served, stored, database):
    """G2: the client gets a 500, nothing of the 201, and the next request is as any other."""
    with served.connect() as client:
        assert 500 == client.request("POST", f"/{database}/orphans/7002")[0]
        assert 7002 not in ids_of(database, served, stored)
    assert "IntegrityError" == served.wait_for("ended").more["error"]
    assert 0 == served.checked_out()
    assert "head 201" not in served.told()
    with served.connect() as client:
        assert 201 == client.request("POST", f"/{database}/items/7003")[0]
    assert 7003 in ids_of(database, served, stored)


def test_failed_commit_runs_nothing_that_comes_after(served, stored):
    """G2: the background task of a response that didn't get committed does not run."""
    with served.connect() as client:
        assert 500 == client.request("POST", "/asyncpg/promised/1")[0]
    served.wait_for("ended")
    assert "background" not in served.told()
    assert [] == stored.ids()


def test_failed_commit_of_a_plain_app_is_the_servers_own_500(served, stored):
    """G2: where no framework answers the server does, in its own time."""
    with served.connect() as client:
        client.send("POST", "/plain/orphans/1")
        assert 500 == client.head()[0]
    assert "IntegrityError" == served.wait_for("ended").more["error"]
    assert ([], 0) == (stored.ids(), served.checked_out())


def test_failed_commit_is_rendered_and_the_connection_lives(served, stored):
    """G2: with an answer of the app's own the connection is good for the next request."""
    with served.connect() as client:
        rendered = client.request("POST", "/asyncpg/rendered/1")
        assert (409, b'{"detail":"conflict"}') == rendered
        assert 201 == client.request("POST", "/asyncpg/items/2")[0]
    assert [2] == stored.ids()


@pytest.mark.parametrize("database", DATABASES)
def test_raised_error_leaves_no_row(served, stored, database):
    """G3: an HTTPException is rolled back before the client hears of it."""
    with served.connect() as client:
        client.send("POST", f"/{database}/refused/7004")
        assert 409 == client.head()[0]
        assert 7004 not in ids_of(database, served, stored)


def test_status_decides_where_nothing_was_raised(served, stored):
    """G3: an unhandled exception and a returned 503 roll back before the head, a returned 404
    commits before it.
    """
    with served.connect() as client:
        assert 500 == client.request("POST", "/asyncpg/raised/1")[0]
    served.wait_for("ended")
    endings = [each for each in served.told() if each in {"commit", "rollback"}]
    with served.connect() as client:
        for status in (503, 404):
            assert status == client.request("POST", f"/asyncpg/returned/{status}/{status}")[0]
            told = served.told(f"/asyncpg/returned/{status}/{status}")
            before = told[: told.index(f"head {status}")]
            endings += [each for each in before if each in {"commit", "rollback"}]
    assert ["rollback", "rollback", "commit"] == endings
    assert [404] == stored.ids()


def test_rollback_only_never_commits(served, stored):
    """G4: a preview's answer goes out as it is; a failure that was swallowed is a 500."""
    with served.connect() as client:
        assert (200, b'{"id":1}') == client.request("POST", "/asyncpg/preview/1")
    with served.connect() as client:
        assert 500 == client.request("POST", "/asyncpg/swallowed/2")[0]
    assert "RollbackOnlyError" == served.wait_for("ended", "/asyncpg/swallowed/2").more["error"]
    assert "commit" not in served.told()
    assert [] == stored.ids()


def test_request_without_a_session_touches_no_connection(served):
    """G5: nothing is checked out, and nothing is begun."""
    with served.connect() as client:
        assert 200 == client.request("GET", "/asyncpg/ping")[0]
    served.wait_for("ended")
    assert "checkout" not in served.told()


def test_one_scope_has_one_session(served):
    """G11: the handler, its child task and its worker thread get the same one."""
    with served.connect() as client:
        assert (200, b"1") == client.request("GET", "/asyncpg/together")


# --------------------------------------------------------------------------------------
# The body, and after it
# --------------------------------------------------------------------------------------


@ON_HTTP1
@pytest.mark.parametrize("path", ["large", "large-stream"])
def test_client_that_does_not_read_holds_no_connection(served, stored, path):
    """G6: while sixteen megabytes wait for their reader the pool is complete. A server with flow
    control holds the app up; the others keep the body in memory.
    """
    path = f"/asyncpg/{path}/1"
    with served.connect() as client:
        client.send("GET", path)
        status, headers = client.head()
        assert (200, [1], 0) == (status, stored.ids(), served.checked_out())
        if path == "/asyncpg/large-stream/1" and served.server.holds_up_the_app:
            assert "ended" not in served.told()
        elif not served.server.holds_up_the_app:
            served.wait_for("ended")
        assert MEGABYTES << 20 == len(client.body(headers))
    served.wait_for("ended")


def test_streams_transaction_is_committed_before_the_last_piece(served, stored):
    """G7: what a body writes is there when the client has read its end."""
    with served.connect() as client:
        assert (200, b"first\nlast\n") == client.request("GET", "/asyncpg/stream/1")
        assert [1] == stored.ids()
    told = served.told()
    assert told.index("commit") < told.index("checkin") < told.index("last body")


def test_pathsend_goes_out_after_the_commit(served, stored):
    """G1, G18: a file's response is committed first; where the server can, it sends the file."""
    with served.connect() as client:
        client.send("GET", "/asyncpg/file/1")
        status, headers = client.head()
        assert (200, [1]) == (status, stored.ids())
        assert b"The app that every server serves" in client.body(headers)
    told = served.told()
    assert served.server.has_pathsend == ("pathsend" in told)
    assert told.index("checkin") < told.index("head 200")


def test_background_work_is_committed_and_idle_background_holds_nothing(served, stored):
    """G6, G8: between the answer and its first statement the task holds no connection; what it
    writes then is committed when it returns, also if the client has left.
    """
    path = "/asyncpg/background/1"
    with served.connect() as client:
        assert 200 == client.request("POST", path)[0]
        served.wait_for("idle")
        assert ([-1], 0) == (stored.ids(), served.checked_out())
        served.allow("begin/1")
        served.wait_for("written")
        client.leave()
    served.allow("end/1")
    assert None is served.wait_for("ended").more["error"]
    assert ([-1, 1], 0) == (stored.ids(), served.checked_out())


def test_connection_lives_on_after_a_failed_background_commit(served, stored):
    """G8: a late failure is logged, and the next request on the connection is answered."""
    with served.connect() as client:
        client.send_all(("POST", "/asyncpg/failing-background/1"), ("POST", "/asyncpg/items/2"))
        status, headers = client.head()
        client.body(headers)
        assert (200, 201) == (status, client.head()[0])
    assert [1, 2] == stored.ids()
    served.wait_for("ended", "/asyncpg/failing-background/1")
    assert "POST /asyncpg/failing-background/1: work after the response" in served.log()


def test_session_refuses_use_after_its_scope(served, stored):
    """G9: a task that outlives its request gets an error, and no connection."""
    with served.connect() as client:
        assert 200 == client.request("POST", "/asyncpg/outlived/1")[0]
    served.wait_for("ended")
    served.allow("outlived/1")
    served.wait_for("refused", count=2)
    refusals = [each.more["error"] for each in served.events if each.what == "refused"]
    assert ["SessionScopeClosedError", "SessionScopeClosedError"] == refusals
    assert 0 == served.checked_out()


# --------------------------------------------------------------------------------------
# Many requests
# --------------------------------------------------------------------------------------


@ON_HTTP1
@pytest.mark.once
def test_burst_of_requests_on_a_small_pool(served, stored):
    """G12: two hundred connections at once on a pool of five: each row once, none lost."""
    with contextlib.ExitStack() as clients:
        sent = [clients.enter_context(served.connect()) for _ in range(200)]
        for number, client in enumerate(sent, 1):
            client.send("POST", f"/asyncpg/items/{number}")
        statuses = {client.head()[0] for client in sent}
    assert {201} == statuses
    assert list(range(1, 201)) == stored.ids()
    served.wait_for("ended", count=200)
    assert 0 == served.checked_out()


def test_pipelined_requests_have_a_transaction_each(served, stored):
    """G3, G12: of three requests in one packet the middle one is refused, and only its row goes."""
    with served.connect() as client:
        paths = ("items/1", "refused/2", "items/3")
        client.send_all(*(("POST", f"/asyncpg/{path}") for path in paths))
        statuses = []
        for _ in range(3):
            status, headers = client.head()
            client.body(headers)
            statuses.append(status)
    assert [201, 409, 201] == statuses
    assert [1, 3] == stored.ids()


def test_request_behind_a_failed_one(served, stored):
    """G1: the next request on the connection of a 500 is answered, or it is run for nobody: the
    framework raises after its answer, and the server then closes the connection.
    """
    with served.connect() as client:
        client.send_all(("POST", "/asyncpg/orphans/1"), ("POST", "/asyncpg/items/2"))
        status, headers = client.head()
        assert 500 == status
        client.body(headers)
        try:
            answer = client.head()[0]
        except Torn:
            answer = None
    served.wait_for("ended", "/asyncpg/items/2")
    assert (None if served.server.closes_after_error else 201) == answer
    assert [2] == stored.ids()


def test_head_and_304_commit_and_leave_the_connection_usable(served, stored):
    """G1, G18: responses without a body are committed before their head like all others."""
    requests = [
        ("GET", "not-modified/2", 304),
        ("GET", "looked/3", 200),
    ]
    if served.server.drops_bodies_of_head:
        requests.insert(0, ("HEAD", "looked/1", 200))
    with served.connect() as client:
        for method, path, expected in requests:
            client.send(method, f"/asyncpg/{path}")
            status, headers = client.head()
            assert expected == status
            assert int(path[-1]) in stored.ids()
            if method == "GET" and expected == 200:
                assert b"0123456789" == client.body(headers)
