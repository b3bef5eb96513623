"""The process of the app: uvicorn, one contestant, and what the audit asks of it.

    python serve.py CONTESTANT URL POOL_SIZE LISTENER

It runs in the contestant's own environment, so it imports nothing of the tests.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.metadata
import json
import logging
import platform
import socket
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

# The installed package is what is tried; the checkout serves where none is installed.
sys.path.append(str(Path(__file__).parents[2]))

import uvicorn
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from bench.chaos import app, sync_app
from bench.chaos.app import APPLICATION_NAME, GRACE, STATE, Contestant

log = logging.getLogger("bench.chaos")

COMMAND_TIMEOUT = 1.5
"""Seconds until the driver gives up waiting for an answer."""

DISTRIBUTIONS = ("sqlalchemy", "asyncpg", "psycopg", "fastapi", "starlette", "uvicorn")
"""Whose versions the results name."""

CONNECT_ARGS: dict[str, dict[str, Any]] = {
    "asyncpg": {
        "timeout": 3,
        "command_timeout": COMMAND_TIMEOUT,
        "server_settings": {"application_name": APPLICATION_NAME},
    },
    "psycopg": {"connect_timeout": 3, "application_name": APPLICATION_NAME},
}


class OneLine(logging.Formatter):
    """A formatter whose tracebacks are their last line, and the notes below it."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's
        return " | ".join("".join(traceback.format_exception_only(ei[1])).split("\n"))


class Observed:
    """The app, and a page that says what is under way in this process."""

    def __init__(self, contestant: Contestant) -> None:
        self._app = contestant.app
        self._pool: Any = contestant.engine.pool
        self._under_way = 0
        self._known: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        if scope["type"] == "http" and scope["path"] == STATE:
            return await self._tell(send)
        self._under_way += 1
        try:
            return await self._app(scope, receive, send)
        except BaseException as error:
            # Work after the response has nobody else to tell.
            log.error("%s ended by %s", scope.get("path"), type(error).__name__)  # noqa: TRY400 - the server shows the rest
            raise
        finally:
            self._under_way -= 1

    async def _tell(self, send: Any) -> None:
        gc.collect()  # a connection that leaked is warned of when it is collected
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if not self._known:  # the server's own
            self._known = tasks
        state = {
            # The lifespan's is under way as long as the server is.
            "requests": self._under_way - 1,
            "checked out": self._pool.checkedout(),
            "tasks": [repr(task) for task in tasks - self._known],
            "versions": {
                **{name: importlib.metadata.version(name) for name in DISTRIBUTIONS},
                "CPython": platform.python_version(),
            },
        }
        body = json.dumps(state).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def main() -> None:
    name, url, pool_size, listener = sys.argv[1:]
    warnings.simplefilter("always")
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(capture=True)
    module = importlib.import_module(f"bench.chaos.contestants.{name}")
    is_sync = getattr(module, "IS_SYNC", False)
    engine = (create_engine if is_sync else create_async_engine)(
        url,
        pool_size=int(pool_size),
        max_overflow=0,
        pool_timeout=2,
        pool_pre_ping=True,
        connect_args=CONNECT_ARGS[make_url(url).get_driver_name()],
    )
    contestant = module.make(engine)
    (sync_app if is_sync else app).add_endpoints(contestant)
    config = uvicorn.Config(
        Observed(contestant),
        lifespan="on",
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=GRACE,
        backlog=512,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(listener))])


if __name__ == "__main__":
    main()
