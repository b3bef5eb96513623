"""The server process of one contestant: uvicorn, and a page that says what it has done.

    python -P serve.py ORDER LISTENER

It runs in the contestant's own environment, so it imports nothing of the tests.
"""

from __future__ import annotations

import gc
import json
import socket
import sys
import time
import tracemalloc
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

# The installed package is what is measured; the checkout serves where none is installed.
sys.path.append(str(Path(__file__).parents[1]))

import uvicorn
from sqlalchemy import event

from bench.apps import STATE, Setup
from bench.contestants import by_name
from bench.memory import resident


class Request:
    """What one request held, and when it could have done without."""

    def __init__(self) -> None:
        self.head = float("inf")
        self.taken: dict[int, float] = {}
        self.holds: list[tuple[float, float]] = []

    def take(self, record: object) -> None:
        self.taken[id(record)] = time.perf_counter()

    def give_back(self, record: object) -> None:
        self.holds.append((self.taken.pop(id(record)), time.perf_counter()))

    def told(self) -> dict[str, float]:
        """Milliseconds: of holding a connection, in all and once the head was on its way."""
        holds = self.holds + [(taken, time.perf_counter()) for taken in self.taken.values()]
        late = sum(max(0.0, until - max(since, self.head)) for since, until in holds)
        return {"held": sum(b - a for a, b in holds) * 1e3, "held after the head": late * 1e3}


_current: ContextVar[Request] = ContextVar("request")


class Watch:
    """Notes when each request holds a connection, by the pool's events.

    They come in the context of who asked for the connection, which is the request's own, its
    task's or its thread's.
    """

    def __init__(self, app: Any, pool: Any) -> None:
        self._app = app
        self._owners: dict[int, Request] = {}
        self.requests: list[Request] = []
        self._events = (
            (pool, "checkout", self._note_checkout),
            (pool, "checkin", self._note_checkin),
        )
        for each in self._events:
            event.listen(*each)

    def end(self) -> list[dict[str, float]]:
        """What each request held."""
        for each in self._events:
            event.remove(*each)
        return [request.told() for request in self.requests]

    def _note_checkout(self, _connection: Any, record: Any, _proxy: Any) -> None:
        request = _current.get(None)
        if request is not None:
            self._owners[id(record)] = request
            request.take(record)

    def _note_checkin(self, _connection: Any, record: Any) -> None:
        request = self._owners.pop(id(record), None)
        if request is not None:
            request.give_back(record)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = Request()
        self.requests.append(request)
        token = _current.set(request)

        async def noting_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                request.head = time.perf_counter()
            await send(message)

        try:
            return await self._app(scope, receive, noting_send)
        finally:
            _current.reset(token)


class Page:
    """The app, and a page that says what this process has done.

    `?watch=on` begins to note what requests hold, `?watch=off` tells it and ends that;
    `?collect=on` collects garbage first; `?trace=on` begins to count what Python allocates, and
    `?trace=off` ends it.
    """

    def __init__(self, app: Any, pool: Any) -> None:
        self.server: Any = None
        self._app = self._raw_app = app
        self._pool = pool
        self._watch: Watch | None = None
        self._asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        if scope["type"] != "http" or scope["path"] != STATE:
            return await self._app(scope, receive, send)
        await self._answer(scope, send)
        return None

    async def _answer(self, scope: Any, send: Any) -> None:
        self._asked += 1
        query = {key: value for key, [value] in parse_qs(scope["query_string"].decode()).items()}
        body = json.dumps(self._tell(query)).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _tell(self, query: dict[str, str]) -> dict[str, Any]:
        if query.get("collect"):
            gc.collect()
        if query.get("trace") == "on":
            tracemalloc.start()
        told = {
            "cpu": time.process_time(),
            "requests": self.server.server_state.total_requests - (self._asked - 1),
            "under way": len(self.server.server_state.tasks) - 1,
            "connections": len(self.server.server_state.connections),
            "checked out": self._pool.checkedout(),
            "resident": resident(),
            "traced": tracemalloc.get_traced_memory()[0],
        }
        if query.get("trace") == "off":
            tracemalloc.stop()
        watching = query.get("watch")
        if watching == "on":
            self._watch = Watch(self._raw_app, self._pool)
            self._app = self._watch
        elif watching == "off" and self._watch is not None:
            told["holds"] = self._watch.end()
            self._app, self._watch = self._raw_app, None
        return told


def main() -> None:
    order = json.loads(sys.argv[1])
    application = by_name(order["name"]).make(Setup(**order["setup"]))
    page = Page(application.app, application.engine.pool)
    # What `pip install uvicorn[standard]` chooses.
    config = uvicorn.Config(
        page, loop="uvloop", http="httptools", access_log=False, log_level="error", backlog=2048
    )
    page.server = uvicorn.Server(config)
    page.server.run(sockets=[socket.socket(fileno=int(sys.argv[2]))])


if __name__ == "__main__":
    main()
