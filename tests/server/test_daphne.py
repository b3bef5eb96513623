"""What only daphne does: it ends requests by the clock, and cancels apps whose client has left."""

import pytest

from tests.fix_served import Served
from tests.server.servers import DAPHNE


def test_app_that_goes_on_without_its_client_is_cancelled(serve, stored):
    """G10: when the client has been gone for `--application-close-timeout` seconds, the handler is
    cancelled and rolled back.
    """
    with serve(DAPHNE, "--application-close-timeout=1") as served:
        with served.connect() as client:
            client.send("POST", "/asyncpg/slow/1")
            served.wait_for("written")
            client.leave()
        assert "CancelledError" == served.wait_for("ended", "/asyncpg/slow/1").more["error"]
        assert ([], 0) == (stored.ids(), served.checked_out())
        assert "took too long to shut down and was killed" in served.log()


@pytest.fixture
def impatient(serve, stored):
    """A daphne that ends requests after a few seconds."""
    with serve(DAPHNE, "--http-timeout=2") as served:
        yield served


def test_handler_goes_on_after_the_servers_503(impatient: Served, stored):
    """G1: when the server has answered 503 in its place the app isn't told: it goes on, and is
    committed; no client gets a success.
    """
    with impatient.connect() as client:
        client.send("POST", "/asyncpg/slow/1")
        assert 503 == client.head()[0]
        impatient.allow("slow/1")
        assert None is impatient.wait_for("ended", "/asyncpg/slow/1").more["error"]
    assert ([1], 0) == (stored.ids(), impatient.checked_out())


def test_stream_that_takes_too_long_ends_cleanly_and_is_rolled_back(impatient: Served, stored):
    """G7: the server ends the body in its own words: the client can't see that it isn't whole."""
    with impatient.connect() as client:
        client.send("GET", "/asyncpg/endless/1")
        _, headers = client.head()
        assert b"line\n" == client.body(headers)
    impatient.wait_for("ended", "/asyncpg/endless/1")
    assert ([1], 0) == (stored.ids(), impatient.checked_out())
