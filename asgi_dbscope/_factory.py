"""From what a user has (an engine, a URL, a session factory) to sessions that report to a scope."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker

from asgi_dbscope._session import reporting_session_class
from asgi_dbscope.errors import ConfigurationError


def make_engine(url: URL | str) -> AsyncEngine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        msg = (
            "The database's URL can't be read; it looks like "
            "'postgresql+asyncpg://user:password@host/name' or 'sqlite+aiosqlite:///file.db'."
        )
        raise ConfigurationError(msg) from error
    try:
        return create_async_engine(parsed)
    except (SQLAlchemyError, ImportError) as error:
        msg = (
            f"No asynchronous engine can be made from this URL ({parsed.drivername}): {error}. Is "
            "the driver installed, and one for asyncio, such as asyncpg, psycopg or aiosqlite?"
        )
        raise ConfigurationError(msg) from error


def reporting_factory(source: object) -> async_sessionmaker[Any]:
    """An ``async_sessionmaker`` like *source*, whose sessions report to their scope."""
    if isinstance(source, async_sessionmaker):
        return _derived_factory(cast("async_sessionmaker[AsyncSession]", source))
    if isinstance(source, AsyncEngine):
        return _derived_factory(async_sessionmaker(source, expire_on_commit=False))
    if isinstance(source, (Engine, sessionmaker)):
        msg = (
            f"{source!r} is synchronous. Make the engine with "
            "sqlalchemy.ext.asyncio.create_async_engine() and an asynchronous driver."
        )
        raise ConfigurationError(msg)
    msg = f"Database() takes an AsyncEngine, a URL or an async_sessionmaker; got {source!r}."
    raise ConfigurationError(msg)


def _derived_factory(factory: async_sessionmaker[AsyncSession]) -> async_sessionmaker[Any]:
    options: dict[str, Any] = dict(factory.kw)
    sync_class = options.get("sync_session_class", factory.class_.sync_session_class)
    if isinstance(sync_class, sessionmaker):
        maker = cast("sessionmaker[Session]", sync_class)
        info = {**maker.kw.get("info", {}), **options.get("info", {})}
        options = {**maker.kw, **options, **({"info": info} if info else {})}
        sync_class = maker.class_
    if not (isinstance(sync_class, type) and issubclass(sync_class, Session)):
        msg = (
            f"sync_session_class must be a subclass of sqlalchemy.orm.Session or a sessionmaker; "
            f"got {sync_class!r}."
        )
        raise ConfigurationError(msg)
    options["sync_session_class"] = reporting_session_class(sync_class)
    options["close_resets_only"] = False  # a closed session refuses use, instead of reopening
    return async_sessionmaker(class_=factory.class_, **options)
