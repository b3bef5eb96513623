"""What the documentation says of the servers is what their tests assert."""

from tests.docs.blocks import ROOT
from tests.server.servers import SERVERS, Server

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


def test_page_of_servers_is_what_the_tests_assert():
    """The table has each server's ways, as the tests ask for them."""
    page = (ROOT / "docs" / "servers.md").read_text(encoding="utf-8")
    table = page.partition("<!-- table: servers -->\n")[2].partition("\n\n")[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]

    columns = {name: [cells[at] for cells in rows] for at, name in enumerate(head) if name}
    assert {each.name.partition("-")[0] for each in SERVERS} == set(columns)
    for server in SERVERS:
        assert row(server) == columns[server.name.partition("-")[0]]
