"""Pytest plugin: every server in a process of its own, and what its app stores and tells."""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.fix_database import Base, Item
from tests.fix_server import reserved_port
from tests.server.channel import VARIABLE
from tests.server.clients import PATIENCE, Client, Torn
from tests.server.http2_client import Http2Client
from tests.server.servers import HTTP2, SERVERS, Server

ROOT = Path(__file__).parents[1]

# --------------------------------------------------------------------------------------
# The servers
# --------------------------------------------------------------------------------------


class Starter:
    """The process that starts servers; `tests/server/starter.py`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.starter"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # What ends the test run must not end who cleans up after it.
            start_new_session=True,
            env={
                **{name: value for name, value in os.environ.items() if "COV" not in name},
                "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]),
            },
        )

    def ask(self, **request: Any) -> Any:
        """Send a request, return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it, and what it has started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()


@dataclass(frozen=True)
class Event:
    """Something that happened in the app's process.

    Attributes:
        what: ``commit``, ``head 201``, ``ended``, ...

        at: When: seconds of the machine's monotonic clock.

        path: For which request.

        more: What else there is to say.
    """

    what: str
    at: float
    path: str
    more: dict[str, Any]


class Served:
    """A server that runs, and what its app tells.

    Attributes:
        server: Which one.

        port: Where it listens.

        file: The SQLite file of its app.

        events: What the app told since the last :meth:`forget`.
    """

    def __init__(
        self, server: Server, process: int, port: int, directory: Path, starter: Starter
    ) -> None:
        self.server = server
        self.port = port
        self.file = directory / "served.db"
        self._log = directory / "log"
        self.events: list[Event] = []
        self._process = process
        self._starter = starter
        self._status: int | None = None
        self._told = threading.Condition()
        self._hearer: socket.socket | None = None
        self._hear: Callable[[], None] = lambda: None
        self._line = b""
        self._has_ended = False
        self._connections: list[Http2Client] = []

    def connect(self) -> Client:
        """A new connection."""
        if not self.server.http2:
            return Client(self.port)
        client = Http2Client(self.port)
        self._connections.append(client)
        return client

    def disconnect(self) -> None:
        """Close the connections of HTTP/2, which outlive their requests."""
        while self._connections:
            self._connections.pop().close()

    def listen(self, teller: socket.socket, hearer: socket.socket) -> threading.Thread:
        """Hear what the app tells, until its process ends, so that it never has to wait."""
        teller.setblocking(False)
        self._hearer = hearer
        self._hear = functools.partial(self._hear_from, teller)
        thread = threading.Thread(target=self._listen, args=(teller,), daemon=True)
        thread.start()
        return thread

    def _listen(self, teller: socket.socket) -> None:
        while not self._has_ended:
            select.select([teller], [], [], PATIENCE)
            self._hear()

    def _hear_from(self, teller: socket.socket) -> None:
        """Take in what has been told up to now: also what came before a byte that a client has."""
        with self._told:
            while not self._has_ended:
                try:
                    heard = teller.recv(1 << 20)
                except BlockingIOError:
                    break
                except ConnectionError:  # it was killed
                    heard = b""
                self._has_ended = not heard
                *lines, self._line = (self._line + heard).split(b"\n")
                for line in lines:
                    told = json.loads(line)
                    event = Event(told.pop("what"), told.pop("at"), told.pop("path"), told)
                    self.events.append(event)
            self._told.notify_all()

    def wait_for(self, what: str, path: str | None = None, *, count: int = 1) -> Event:
        """The first event of that kind (or the *count*-th), now or later."""

        def find() -> Event | None:
            found = [
                each for each in self.events if each.what == what and path in {None, each.path}
            ]
            return found[count - 1] if len(found) >= count else None

        with self._told:
            found = self._told.wait_for(find, PATIENCE)
        assert found, f"no {what!r} of {path!r}; there was {self.told()}"
        return found

    def told(self, path: str | None = None) -> list[str]:
        """What happened, in order; for one request or for all."""
        self._hear()
        return [each.what for each in self.events if path in {None, each.path}]

    def wait_until_idle(self) -> None:
        """Wait until every request that was begun has ended in the app."""

        def is_idle() -> bool:
            told = [each.what for each in self.events if each.path != "lifespan"]
            return told.count("called") == told.count("ended")

        self._hear()
        with self._told:
            assert self._told.wait_for(is_idle, PATIENCE), f"requests go on: {self.events}"

    def forget(self) -> None:
        """Begin a new list of events."""
        self._hear()
        with self._told:
            self.events = []

    def allow(self, name: str) -> None:
        """Let the app go on that waits for *name*."""
        assert self._hearer is not None
        with contextlib.suppress(ConnectionError):  # it may have ended
            self._hearer.sendall(name.encode() + b"\n")

    def checked_out(self) -> int:
        """How many connections are out of the pools."""
        return self.told().count("checkout") - self.told().count("checkin")

    def signal(self, number: int) -> None:
        """Send a signal to the server's first process."""
        os.kill(self._process, number)

    def log(self) -> str:
        """What it has written to its output."""
        return self._log.read_text()

    def wait_until_closed(self) -> None:
        """Wait until nobody new is served."""
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(OSError, Torn):
            while time.monotonic() < deadline:
                with self.connect() as client:
                    client.request("GET", "/asyncpg/ping")

    def exit_status(self, within: float = PATIENCE) -> int | None:
        """The process's status when it has ended; ``None`` if it goes on running."""
        deadline = time.monotonic() + within
        while self._status is None:
            self._status = self._starter.ask(process=self._process)
            if self._status is None:
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.01)
        return self._status

    def kill(self) -> None:
        """Kill what still runs of it, with its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        self.exit_status()


Serve = Callable[..., contextlib.AbstractContextManager[Served]]


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """The process that starts servers, one for all."""
    starter = Starter()
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def held_commits(postgres_schema: sa.Engine) -> Iterator[None]:
    """In the database: an item noted as held keeps its COMMIT waiting for a lock."""
    with postgres_schema.connect() as connection:
        connection.exec_driver_sql(_HOLD)
    yield
    with postgres_schema.connect() as connection:
        connection.exec_driver_sql("DROP FUNCTION hold CASCADE")


_HOLD = """
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_advisory_xact_lock_shared(77); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER hold AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.note = 'held') EXECUTE FUNCTION hold();
"""


@pytest.fixture(scope="session")
def serve(
    starter: Starter,
    held_commits: None,
    postgres_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Serve:
    """Serve the app by a server, in a process of its own."""

    @contextlib.contextmanager
    def serve(server: Server, *options: str) -> Iterator[Served]:
        directory = tmp_path_factory.mktemp(server.name)
        with socket.socket(socket.AF_UNIX) as listener, reserved_port() as port:
            listener.bind(str(directory / "channel"))
            listener.listen()
            listener.settimeout(PATIENCE)
            process = starter.ask(
                module=server.module,
                arguments=[each.format(port=port) for each in (*server.arguments, *options)],
                environment={
                    "DBSCOPE_SERVED_URL": postgres_url,
                    "DBSCOPE_SERVED_FILE": str(directory / "served.db"),
                    VARIABLE: str(directory / "channel"),
                },
                log=str(directory / "log"),
            )
            served = Served(server, process, port, directory, starter)
            try:
                _wait_until_ready(served)
                with listener.accept()[0] as teller, listener.accept()[0] as hearer:
                    hearing = served.listen(teller, hearer)
                    served.wait_until_idle()
                    try:
                        yield served
                    finally:
                        served.kill()
                        hearing.join(PATIENCE)
            finally:
                served.kill()
                served.disconnect()

    return serve


def _wait_until_ready(served: Served) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with served.connect() as client:
                assert (200, b'"pong"') == client.request("GET", "/asyncpg/ping")
                return
        except (OSError, Torn):
            if served.exit_status(0) is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{served.server.name}: {served.log()}") from None
            time.sleep(0.01)


WITH_HTTP2 = [*SERVERS, *(pytest.param(each, marks=pytest.mark.once) for each in HTTP2)]
"""Each server, and in HTTP/2 those that speak it."""


@pytest.fixture(scope="session", params=WITH_HTTP2, ids=str)
def shared_server(request: pytest.FixtureRequest, serve: Serve) -> Iterator[Served]:
    """Each server in turn, one process for all tests of it."""
    with serve(request.param) as served:
        yield served


ON_HTTP1 = pytest.mark.parametrize("shared_server", SERVERS, indirect=True, ids=str)
"""For a test of what HTTP/2 has nothing of."""


@pytest.fixture
def served(shared_server: Served, stored: "Stored") -> Iterator[Served]:
    """Each server in turn; nothing has been told yet, and nothing is stored."""
    shared_server.forget()
    yield shared_server
    shared_server.wait_until_idle()
    shared_server.disconnect()


# --------------------------------------------------------------------------------------
# What is stored
# --------------------------------------------------------------------------------------


class Stored:
    """What is committed in PostgreSQL, seen by connections of the test's own."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def ids(self) -> list[int]:
        """The ids of the items."""
        with self._engine.connect() as connection:
            return list(connection.scalars(sa.select(Item.id).order_by(Item.id)))

    def has_released(self, item_id: int) -> bool:
        """Whether nothing of a row is left, not even in a transaction that goes on."""
        with self._engine.connect() as connection:
            connection.exec_driver_sql(f"SET lock_timeout = '{int(PATIENCE)}s'")
            connection.execute(sa.insert(Item).values(id=item_id))
            return bool(connection.execute(sa.delete(Item).filter_by(id=item_id)).rowcount)

    @contextlib.contextmanager
    def holding_commits(self) -> Iterator[None]:
        """Keep the COMMIT of held items waiting."""
        with self._engine.connect() as connection:
            connection.exec_driver_sql("SELECT pg_advisory_lock(77)")
            try:
                yield
            finally:
                connection.exec_driver_sql("SELECT pg_advisory_unlock(77)")

    def wait_for_held_commit(self) -> None:
        """Wait until the database has a COMMIT that waits."""
        waiting = (
            "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)"
            " WHERE locktype = 'advisory' AND NOT granted AND query ILIKE 'COMMIT%%'"
            " AND datname = current_database()"
        )
        deadline = time.monotonic() + PATIENCE
        with self._engine.connect() as connection:
            while not connection.exec_driver_sql(waiting).scalar():
                assert time.monotonic() < deadline, "no COMMIT came"

    def empty(self) -> None:
        """Delete everything."""
        with self._engine.connect() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                connection.execute(table.delete())


@pytest.fixture
def stored(postgres_schema: sa.Engine) -> Iterator[Stored]:
    """What is committed; nothing, as a test begins."""
    stored = Stored(postgres_schema)
    stored.empty()
    yield stored
    stored.empty()
