"""What the documentation says of the servers is what their tests assert."""

from tests.docs.blocks import ROOT
from tests.server.servers import HTTP2, SERVERS, Server

AFTER_ERROR = {True: "closes the connection", False: "leaves it open"}


def row(server: Server) -> list[str]:
    """What the page has to say of a server, from top to bottom."""
    return [
        "with the request's head" if server.calls_before_body else "after its body",
        "at once" if server.sends_head_at_once else "with the body's first piece",
        "holds up the app" if server.holds_up_the_app else "fills the server's memory",
        "sent by the server" if server.has_pathsend else "the app's chunks",
        "is answered" if server.answers_half_closed else "is gone",
        AFTER_ERROR[server.closes_after_error],
        AFTER_ERROR[server.closes_torn_bodies],
        "yes" if server.has_lifespan else "no",
        "are finished" if server.finishes_requests else "are cancelled",
    ]


def http2_row(server: Server) -> list[str]:
    """What it has to say of a server in HTTP/2."""
    return [
        "holds up the app" if server.holds_up_the_app else "fills the server's memory",
        "resets the stream" if server.closes_torn_bodies else "goes on without one",
        "is left out" if server.drops_bodies_of_head else "is sent",
        "is nobody's" if server.outlives_late_bodies else "cancels the connection's requests",
        "holds up nobody"
        if server.reads_past_unread_bodies
        else "holds up the connection, for good",
        "is swallowed" if server.returns_from_send else "is waited for, for good",
    ]


def columns_of(table: str) -> dict[str, list[str]]:
    """One of the page's tables, by server."""
    page = (ROOT / "docs" / "servers.md").read_text(encoding="utf-8")
    text = page.partition(f"<!-- table: {table} -->\n")[2].partition("\n\n")[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    ]
    return {name: [cells[at] for cells in rows] for at, name in enumerate(head) if at}


def test_page_of_servers_is_what_the_tests_assert():
    """The tables have each server's ways, as the tests ask for them."""
    columns = columns_of("servers")
    assert {each.name.partition("-")[0] for each in SERVERS} == set(columns)
    for server in SERVERS:
        assert row(server) == columns[server.name.partition("-")[0]]

    assert {each.name.partition("-")[0]: http2_row(each) for each in HTTP2} == columns_of("http2")
