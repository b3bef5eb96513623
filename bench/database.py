"""The PostgreSQL that the contestants talk to."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from sqlalchemy import create_engine, insert, make_url

from bench.apps import NAME, Base, Item
from bench.postgres import WheelServer

if TYPE_CHECKING:
    from collections.abc import Generator


@contextlib.contextmanager
def database(url: str | None) -> Generator[str]:
    """The one named, else one from the wheel on a unix socket, with the tables in it."""
    with contextlib.ExitStack() as stack:
        if url is None:
            server = WheelServer(max_connections="400")
            stack.callback(server.stop)
            url = server.url().render_as_string(hide_password=False)
        stack.enter_context(_tables(url))
        yield url


@contextlib.contextmanager
def _tables(url: str) -> Generator[None]:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Item).values(name=NAME))
    try:
        yield
    finally:
        Base.metadata.drop_all(engine)
        engine.dispose()
