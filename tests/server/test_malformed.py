"""Response heads that can't be understood, sent to real servers, of which some would take them."""

import contextlib

from tests.messages import MALFORMED_HEADS


def test_head_that_cannot_be_understood_is_a_500_and_no_row(served, stored):
    """G1: whatever the server would have made of it, the client hears of no success."""
    paths = [f"/plain/malformed/{number}" for number in range(len(MALFORMED_HEADS))]
    with contextlib.ExitStack() as clients:
        sent = [clients.enter_context(served.connect()) for _ in paths]
        for client, path in zip(sent, paths, strict=True):
            client.send("POST", path)
        statuses = [client.head()[0] for client in sent]

    assert [500] * len(paths) == statuses
    errors = [served.wait_for("ended", path).more["error"] for path in paths]
    assert ["MalformedMessageError"] * len(paths) == errors
    assert [] == stored.ids()


def test_head_after_one_that_the_server_refused_leaves_no_row(served, stored):
    """G3: whether the server would take a second head or not, no error comes with a row."""
    with served.connect() as client:
        client.send("POST", "/plain/refused/1")
        served.wait_for("ended", "/plain/refused/1")

    assert [] == stored.ids()
