"""Starts servers as a shell does, but from a process that has imported their libraries already.

A line on its input starts a server, or asks what became of one; each gets a line for an answer.
When its input ends it kills what it has started, and goes.
"""

import contextlib
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any

PRELOADED = [
    *("aiosqlite", "asyncpg", "fastapi", "psycopg", "sqlalchemy.ext.asyncio", "tests.fix_database"),
    *("sqlalchemy.dialects.postgresql.asyncpg", "sqlalchemy.dialects.postgresql.psycopg"),
    *("sqlalchemy.dialects.sqlite.aiosqlite", "asgi_dbscope", "tests.server.channel"),
    *("uvicorn.main", "hypercorn.__main__", "hypercorn.asyncio.run", "granian.cli"),
    *("uvicorn.protocols.http.h11_impl", "uvicorn.protocols.http.httptools_impl", "websockets"),
    *("twisted.internet.asyncioreactor", "twisted.internet.endpoints", "twisted.web.http"),
    *("autobahn.twisted.websocket", "tests.messages"),
]
"""What servers and the app import; of daphne only what comes before it chooses a reactor."""


def start(module: str, arguments: list[str], environment: dict[str, str], log: str) -> int:
    """Run *module* as ``python -m`` does, in a child; return the child's process id."""
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        told = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(told, 1)
        os.dup2(told, 2)
        os.environ.update(environment)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # Without what the starter itself would do at its end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def state(process: int) -> int | None:
    """The exit status of a child: below zero the signal that ended it; ``None`` while it runs."""
    ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def main() -> None:
    """Serve the test run until it is gone."""
    for name in PRELOADED:
        __import__(name)
    started: list[int] = []
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "module" in request:
            started.append(start(**request))
            print(started[-1], flush=True)  # noqa: T201 - the answer
        else:
            print(json.dumps(state(request["process"])), flush=True)  # noqa: T201
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


if __name__ == "__main__":
    main()
