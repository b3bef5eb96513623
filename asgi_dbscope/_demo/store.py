"""Where a ledger is kept: an SQLite file, or a schema of its own on PostgreSQL."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, NullPool, delete, event, func, insert, make_url, select
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.schema import CreateSchema, DropSchema

from asgi_dbscope._demo import recorder
from asgi_dbscope._demo.ledger import (
    OPENING_BALANCES,
    Account,
    Base,
    Entry,
    Label,
    Page,
    Receipt,
    Transfer,
)
from asgi_dbscope._text import masked

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from sqlalchemy import Connection, PoolProxiedConnection
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry

COUNTED = {"transfers": Transfer, "entries": Entry, "pages": Page, "receipts": Receipt}
"""The tables that the tour counts rows of."""

DRIVERS = ("postgresql+asyncpg", "postgresql+psycopg")
"""What ``--url`` may name."""

TIMEOUT = 10.0
"""Seconds that a database may take to make the tables, or to drop them."""


class DemoError(Exception):
    """The demo can't run; the message is the one line to print."""


class Store:
    """A ledger's tables, twice connected: the app's own engine, and one to look from outside.

    Attributes:
        engine: The app's, with a pool.

        sessions: What the app makes its sessions with.
    """

    def __init__(self, url: URL, schema: str | None) -> None:
        self.schema = schema
        self.engine = self._connect(url)
        self.sessions: async_sessionmaker[AsyncSession] = async_sessionmaker(
            self.engine, expire_on_commit=False, sync_session_class=recorder.RecordedSession
        )
        self._out: dict[ConnectionPoolEntry, PoolProxiedConnection] = {}
        event.listen(self.engine.sync_engine, "checkout", self._note_checkout)
        event.listen(self.engine.sync_engine, "checkin", self._note_checkin)
        recorder.watch(self.engine)
        self._observer = self._connect(url, poolclass=NullPool)

    def _connect(self, url: URL, **options: Any) -> AsyncEngine:
        engine = create_async_engine(url, **options)
        if self.schema is None:
            event.listen(engine.sync_engine, "connect", _enforce_foreign_keys)
            return engine
        return engine.execution_options(schema_translate_map={None: self.schema})

    def __str__(self) -> str:
        place = masked(self.engine.url)
        return place if self.schema is None else f"{place}, schema {self.schema}"

    def held(self) -> int:
        """How many connections the app has out of its pool now."""
        return len(self._out)

    def _note_checkout(
        self, _: DBAPIConnection, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection
    ) -> None:
        self._out[entry] = proxy

    def _note_checkin(self, _: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        self._out.pop(entry, None)

    async def create(self) -> None:
        """Make the tables."""
        async with self._observer.begin() as connection:
            if self.schema is not None:
                await connection.execute(CreateSchema(self.schema))
            await connection.run_sync(Base.metadata.create_all)

    async def reset(self) -> None:
        """Put everything back to the beginning."""
        await self._reclaim()
        async with self._observer.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                await connection.execute(delete(table))
            for name, balance in OPENING_BALANCES.items():
                await connection.execute(insert(Account).values(name=name, opening_balance=balance))
            await connection.execute(insert(Label).values(name="rent"))

    async def _reclaim(self) -> None:
        """Throw away the connections that the app leaked: they may hold locks."""
        for proxy in list(self._out.values()):
            async with self._observer.connect() as connection:
                await connection.run_sync(_invalidate, proxy)

    async def rows(self) -> dict[str, int]:
        """How many rows there are, for whoever else looks."""
        async with self._observer.connect() as connection:
            return {
                name: await connection.scalar(select(func.count()).select_from(table)) or 0
                for name, table in COUNTED.items()
            }

    async def close(self, *, keep: bool) -> None:
        """Give every connection back to the database, and drop the schema."""
        await self._reclaim()
        await self.engine.dispose()
        if self.schema is None or keep:
            return
        try:
            async with asyncio.timeout(TIMEOUT), self._observer.begin() as connection:
                await connection.execute(DropSchema(self.schema, cascade=True))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is one line
            raise DemoError(
                f"The schema {self.schema} can't be dropped: {_first_line(error)}"
            ) from None


@asynccontextmanager
async def open_stores(
    url: str | None, directory: Path, *, keep: bool
) -> AsyncGenerator[list[Store]]:
    """Two stores, for the two apps: files in *directory*, or schemas of the database at *url*.

    Raises:
        DemoError: If the URL can't be read, or the database can't be reached.
    """
    stores: list[Store] = []
    name = f"asgi_dbscope_demo_{secrets.token_hex(4)}"
    try:
        for suffix in ("", "_yield"):
            if url is None:
                place = URL.create("sqlite+aiosqlite", database=f"{directory}/ledger{suffix}.db")
                store = Store(place, None)
            else:
                store = _open_postgresql(url, name + suffix)
            await _create(store)
            stores.append(store)
        yield stores
    finally:
        for store in stores:
            await store.close(keep=keep)


def _open_postgresql(text: str, schema: str) -> Store:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise DemoError(
            "The URL can't be read; it looks like postgresql+asyncpg://user:password@host/name"
        ) from None
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+asyncpg")
    if url.drivername not in DRIVERS:
        raise DemoError(
            f"--url takes {' or '.join(DRIVERS)}, not {url.drivername}; "
            "without --url the demo makes an SQLite file of its own."
        )
    return Store(url, schema)


async def _create(store: Store) -> None:
    try:
        async with asyncio.timeout(TIMEOUT):
            await store.create()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is one line
        raise DemoError(
            f"The database {masked(store.engine.url)} can't be used: {_first_line(error)}"
        ) from None


def _invalidate(_: Connection, proxy: PoolProxiedConnection) -> None:
    proxy.invalidate()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _enforce_foreign_keys(connection: Any, record: object) -> None:  # noqa: ARG001 - SQLAlchemy's
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
