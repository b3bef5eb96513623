"""The servers, and how they differ: what is asserted of each, and what the documentation says."""

import signal
import sys
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Server:
    """How to start a server, and its ways.

    Attributes:
        name: What a test's id calls it.

        module: What ``python -m`` runs.

        arguments: Its command line; ``{port}`` stands for the port.

        calls_before_body: Whether the app is called as soon as the request's head is there.

        sends_head_at_once: Whether a response head goes out before the body's first piece.

        holds_up_the_app: Whether ``send`` waits for a client that reads slowly.

        has_pathsend: Whether it has the extension ``http.response.pathsend``.

        closes_after_error: Whether it closes the connection of an app that raised after its answer.

        closes_torn_bodies: Whether it closes the connection of a body without an end.

        answers_half_closed: Whether a client that has closed its half gets its answer.

        has_lifespan: Whether the app hears of its start and its end.

        finishes_requests: Whether a request that runs when the signal comes is finished.

        exit_status: Of a process that was stopped by SIGTERM; below zero the signal.

        grace: The option for a second of grace after SIGTERM.

        at_grace_end: What becomes of a request that goes on: ``"cancelled"``, ``"killed"`` (while
            it cleans up, or with no word to it), or ``"waited for"``: the option has no effect.

        answers_cancelled: Whether the client of a cancelled request gets a 500.

        is_forced_by: A second signal that ends the process at once.

        drops_bodies_of_head: Whether an answer to HEAD goes out without the app's body.

        outlives_late_bodies: Whether a connection goes on when a body comes after its answer.

        reads_past_unread_bodies: Whether a body that its app doesn't read holds up nobody else.

        returns_from_send: Whether ``send`` returns to an app when the client is gone.

        http2: Whether it is spoken to in HTTP/2, many requests on one connection.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    calls_before_body: bool = True
    sends_head_at_once: bool = True
    holds_up_the_app: bool = True
    has_pathsend: bool = False
    closes_after_error: bool = False
    closes_torn_bodies: bool = True
    answers_half_closed: bool = False
    has_lifespan: bool = True
    finishes_requests: bool = True
    exit_status: int = 0
    grace: tuple[str, ...] = ()
    at_grace_end: Literal["cancelled", "killed", "waited for"] = "killed"
    answers_cancelled: bool = False
    is_forced_by: tuple[signal.Signals, ...] = ()
    drops_bodies_of_head: bool = True
    outlives_late_bodies: bool = True
    reads_past_unread_bodies: bool = True
    returns_from_send: bool = True
    http2: bool = False

    def __str__(self) -> str:
        return self.name


APP = "tests.server.served:app"

WAITS_FOR_CONNECTIONS = sys.version_info >= (3, 12)
"""Whether ``asyncio.Server.wait_closed()`` waits for the connections, however long that takes."""


def _uvicorn(http: str, loop: str) -> Server:
    return Server(
        name=f"uvicorn-{http}-{loop}",
        module="uvicorn",
        arguments=("--port={port}", f"--http={http}", f"--loop={loop}", "--no-access-log", APP),
        closes_after_error=True,
        exit_status=-signal.SIGTERM,
        grace=("--timeout-graceful-shutdown=1",),
        is_forced_by=() if loop == "asyncio" and WAITS_FOR_CONNECTIONS else (signal.SIGINT,),
    )


DAPHNE = Server(
    name="daphne",
    module="daphne",
    arguments=("--port={port}", APP),
    calls_before_body=False,
    sends_head_at_once=False,
    holds_up_the_app=False,
    closes_torn_bodies=False,
    has_lifespan=False,
    finishes_requests=False,
    at_grace_end="cancelled",
)

HYPERCORN = Server(
    name="hypercorn",
    module="hypercorn",
    arguments=("--bind=127.0.0.1:{port}", "--workers=0", APP),
    answers_half_closed=True,
    grace=("--graceful-timeout=1",),
    at_grace_end="waited for" if WAITS_FOR_CONNECTIONS else "cancelled",
    answers_cancelled=True,
)

GRANIAN = Server(
    name="granian",
    module="granian",
    arguments=("--interface=asgi", "--port={port}", APP),
    sends_head_at_once=False,
    has_pathsend=True,
    grace=("--workers-kill-timeout=1",),
)

SERVERS = [
    _uvicorn("h11", "asyncio"),
    _uvicorn("h11", "uvloop"),
    _uvicorn("httptools", "asyncio"),
    _uvicorn("httptools", "uvloop"),
    HYPERCORN,
    GRANIAN,
    DAPHNE,
]

HTTP2 = [
    replace(
        HYPERCORN,
        name="hypercorn-http2",
        http2=True,
        holds_up_the_app=False,
        closes_torn_bodies=False,
        outlives_late_bodies=False,
        reads_past_unread_bodies=False,
        returns_from_send=False,
    ),
    replace(GRANIAN, name="granian-http2", http2=True, drops_bodies_of_head=False),
]
"""The same in HTTP/2, without TLS: its clients know that the server speaks it."""

ONE_OF_EACH_LOOP = [each for each in SERVERS if not each.name.startswith("uvicorn-httptools")]
"""What ends a process depends on the loop, not on the parser."""
