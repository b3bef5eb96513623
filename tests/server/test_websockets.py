"""Websockets on every server: each message is a scope, and none holds a connection between two."""

import socket

import websockets.sync.client as websockets_client

from tests.fix_served import ON_HTTP1


def connected(served):
    """A websocket to the app."""
    url = f"ws://127.0.0.1:{served.port}/asyncpg/echo"
    return websockets_client.connect(url, open_timeout=30, close_timeout=1, compression=None)


@ON_HTTP1
def test_each_message_is_committed_before_its_answer(served, stored, monkeypatch):
    """G17: the row is there with the answer, and between messages the pool is complete."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with connected(served) as websocket:
        for number in (1, 2):
            websocket.send(str(number))
            assert f"{number} committed" == websocket.recv(30)
            assert (list(range(1, number + 1)), 0) == (stored.ids(), served.checked_out())
    served.wait_for("ended")


@ON_HTTP1
def test_client_that_leaves_inside_a_block(served, stored, monkeypatch):
    """G17: a block whose client left is rolled back."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with connected(served) as websocket:
        websocket.send("-1")
        served.wait_for("written")
        websocket.socket.shutdown(socket.SHUT_RDWR)
    assert "WebSocketDisconnect" == served.wait_for("ended").more["error"]
    assert ([], 0) == (stored.ids(), served.checked_out())
