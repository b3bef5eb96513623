"""A proxy before PostgreSQL that lets the server answer later, as over a network."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy import URL


@contextlib.contextmanager
def delayed(url: str, seconds: float) -> Generator[str]:
    """A URL for the same database, on which each message to the server takes *seconds* longer.

    The messages of one round trip are one packet, as drivers send them.
    """
    target = make_url(url)
    directory = Path(tempfile.mkdtemp(prefix="bench-delay-"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / ".s.PGSQL.5432"))
        listener.listen()
        threading.Thread(target=_accept, args=(listener, target, seconds), daemon=True).start()
        try:
            here = target.set(host=None, port=None, query={"host": str(directory)})
            yield here.render_as_string(hide_password=False)
        finally:
            shutil.rmtree(directory)
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, target: URL, seconds: float) -> None:
    with contextlib.suppress(OSError):  # the listener was closed
        while True:
            client, _ = listener.accept()
            server = _connect(target)
            for source, sink, pause in ((client, server, seconds), (server, client, 0.0)):
                threading.Thread(target=_pass_on, args=(source, sink, pause), daemon=True).start()


def _connect(target: URL) -> socket.socket:
    directory = target.query.get("host")
    port = target.port or 5432
    if isinstance(directory, str) and directory.startswith("/"):
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{directory}/.s.PGSQL.{port}")
        return server
    return socket.create_connection((target.host or "localhost", port))


def _pass_on(source: socket.socket, sink: socket.socket, pause: float) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if pause:
                time.sleep(pause)
            sink.sendall(data)
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
