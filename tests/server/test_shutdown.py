"""A server that is told to stop under load: nothing that was acknowledged is lost."""

import contextlib
import itertools
import signal
import threading
import time

import pytest

from tests.fix_served import WITH_HTTP2, Served
from tests.server.clients import PATIENCE, Client, Torn
from tests.server.servers import ONE_OF_EACH_LOOP

CLIENTS = 8
"""How many connections write, one row after the other, when the signal comes."""


class Load:
    """Clients that write until their server is gone, and remember what they were told."""

    def __init__(self, served: Served) -> None:
        self.acknowledged: list[int] = []
        self._served = served
        self._threads = [
            threading.Thread(target=self._write, args=(1000 * number,), daemon=True)
            for number in range(1, CLIENTS + 1)
        ]
        for thread in self._threads:
            thread.start()

    def _write(self, first: int) -> None:
        ids = itertools.count(first)
        with contextlib.suppress(OSError, Torn):
            while True:
                with self._served.connect() as client:
                    for item_id in itertools.islice(ids, 5):
                        status, _ = client.request("POST", f"/asyncpg/items/{item_id}")
                        assert 201 == status
                        self.acknowledged.append(item_id)

    def wait_for(self, count: int) -> None:
        """Wait until so many rows were acknowledged."""
        deadline = time.monotonic() + PATIENCE
        while len(self.acknowledged) < count:
            assert time.monotonic() < deadline, "the load is not served"
            time.sleep(0.01)

    def join(self) -> None:
        """Wait for the last client."""
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def status_of(client: Client) -> int | None:
    """The status of the answer, if one comes."""
    try:
        return client.head()[0]
    except Torn:
        return None


@pytest.mark.parametrize("server", WITH_HTTP2, ids=str)
def test_stop_under_load_loses_nothing(serve, stored, server):
    """G1, G10, G17: every acknowledged row is there; a COMMIT under way is finished; a request in
    its handler is finished and answered, or cancelled and rolled back; an engine of our own is
    disposed of before the server is told that the app has shut down.
    """
    with serve(server) as served, served.connect() as slow, served.connect() as held:
        with served.connect() as client:
            assert 201 == client.request("POST", "/owned/items/1")[0]
        slow.send("POST", "/asyncpg/slow/2")
        served.wait_for("written")
        with stored.holding_commits():
            held.send("POST", "/asyncpg/held/3")
            stored.wait_for_held_commit()
            load = Load(served)
            load.wait_for(20)
            served.signal(signal.SIGTERM)
            load.join()
        served.allow("slow/2")
        answers = [status_of(held), status_of(slow)]
        served.disconnect()
        assert server.exit_status == served.exit_status()
        told = served.told()

    rows = set(stored.ids())
    assert set(load.acknowledged) <= rows
    assert len(rows - {1, 2, 3}) <= len(load.acknowledged) + CLIENTS
    assert (3 in rows, 2 in rows) == (True, server.finishes_requests)
    assert ([201, 201] if server.finishes_requests else [None, None]) == answers
    if server.has_lifespan:
        assert told.index("engine_disposed") < told.index("lifespan.shutdown.complete")
    else:
        assert "engine_disposed" not in told


@pytest.mark.parametrize("server", ONE_OF_EACH_LOOP, ids=str)
def test_request_that_outlasts_the_grace(serve, stored, server):
    """G10: when the server's patience ends the request is cancelled, or killed with the process:
    it is rolled back, and the client gets no success.
    """
    with serve(server, *server.grace) as served, served.connect() as client:
        client.send("POST", "/asyncpg/slow/1")
        served.wait_for("written")
        served.signal(signal.SIGTERM)
        if server.at_grace_end == "waited for":
            assert None is served.exit_status(within=2.0)
            served.allow("slow/1")
            assert (201, 0) == (status_of(client), served.exit_status())
            assert [1] == stored.ids()
        else:
            assert server.exit_status == served.exit_status(within=10.0)
            answer = 500 if server.answers_cancelled else None
            assert (answer, []) == (status_of(client), stored.ids())
            assert stored.has_released(1)
            ends = ["rollback", "checkin", "ended"] if server.at_grace_end == "cancelled" else []
            assert ends == [each for each in served.told("/asyncpg/slow/1") if each in ends]


@pytest.mark.parametrize("server", ONE_OF_EACH_LOOP, ids=str)
def test_second_signal(serve, stored, server):
    """G10: another SIGTERM changes nothing; SIGINT ends some servers at once, and then the request
    is rolled back.
    """
    with serve(server) as served, served.connect() as client:
        client.send("POST", "/asyncpg/slow/1")
        served.wait_for("written")
        served.signal(signal.SIGTERM)
        served.wait_until_closed()
        for number in (signal.SIGTERM, signal.SIGINT):
            if server.finishes_requests and served.exit_status(within=0.3) is None:
                served.signal(number)
        if server.is_forced_by or not server.finishes_requests:
            assert server.exit_status == served.exit_status()
            assert (None, []) == (status_of(client), stored.ids())
            assert stored.has_released(1)
        else:
            served.allow("slow/1")
            assert (201, server.exit_status) == (status_of(client), served.exit_status())
            assert [1] == stored.ids()
