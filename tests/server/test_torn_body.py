"""A body whose COMMIT fails: what the client sees, and what the server does next."""

import pytest

from tests.server.servers import SERVERS


@pytest.mark.parametrize("server", SERVERS, ids=str)
def test_body_whose_commit_fails_is_torn(serve, stored, server):
    """G7: the client never sees the clean end of the body: the connection is closed, or stays open
    without it, and then the server answers no other request that fails in it any more.
    """
    with serve(server) as served:
        with served.connect() as client:
            client.send("GET", "/asyncpg/torn/1")
            status, headers = client.head()
            assert (200, "chunked") == (status, headers["transfer-encoding"])
            assert b"line\n" == client.chunk()
            assert "IntegrityError" == served.wait_for("ended", "/asyncpg/torn/1").more["error"]
            assert server.closes_torn_bodies == client.has_ended(1.5)
        assert "last body" not in served.told("/asyncpg/torn/1")
        assert ([], 0) == (stored.ids(), served.checked_out())
        with served.connect() as client:
            client.send("POST", "/plain/orphans/2")
            served.wait_for("ended", "/plain/orphans/2")
            assert server.closes_torn_bodies == client.has_bytes(2.0)
        assert [] == stored.ids()
