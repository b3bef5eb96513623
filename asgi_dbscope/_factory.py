"""From what a user has (an engine, a URL, a session factory) to sessions that report to a scope."""

from __future__ import annotations

from typing import Any, cast, get_args

from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker

from asgi_dbscope._options import check_choice
from asgi_dbscope._poolers import Pooler, pgbouncer_options, read_url
from asgi_dbscope._reads import read_only_options
from asgi_dbscope._session import reporting_session_class
from asgi_dbscope._text import masked, told
from asgi_dbscope.errors import ConfigurationError


def make_engine(
    url: URL | str, pooler: Pooler | None = None, *, reads_for: bool | None = None
) -> AsyncEngine | Engine:
    """An engine for *url*, by way of *pooler*: asynchronous if its driver can be.

    Args:
        url: Where to.

        pooler: What stands in between.

        reads_for: For the reads of a database that is synchronous, or isn't; ``None`` if for all.

    Its errors don't show the parameters of a statement.

    Raises:
        ConfigurationError: If none can be made.
    """
    parsed = read_url(url)
    options: dict[str, Any] = {} if reads_for is None else {"isolation_level": "AUTOCOMMIT"}
    if pooler is not None:
        options = pgbouncer_options(parsed, **options)
    elif reads_for is not None:  # a pooler would refuse it
        options = read_only_options(parsed)
    options["hide_parameters"] = True
    try:
        dialect = parsed.get_dialect()
        if dialect.get_async_dialect_cls(parsed).is_async and reads_for is not True:
            return create_async_engine(parsed, **options)
        return create_engine(parsed, **options)
    except (SQLAlchemyError, ImportError) as error:
        if str(parsed) in str(error):  # it shows the query, and there may be a password in it
            raise ConfigurationError(f"No engine can be made from {masked(parsed)}.") from None
        msg = (
            f"No engine can be made from this URL ({parsed.drivername}): {error}. Is the driver "
            "installed? Those for asyncio are asyncpg, psycopg or aiosqlite, for example."
        )
        raise ConfigurationError(msg) from error


def reporting_factory(source: object) -> async_sessionmaker[Any] | sessionmaker[Any]:
    """A session factory like *source*, whose sessions report to their scope.

    Raises:
        ConfigurationError: If *source* is nothing that sessions come from.
    """
    if isinstance(source, async_sessionmaker):
        return _derived_async(cast("async_sessionmaker[AsyncSession]", source))
    if isinstance(source, AsyncEngine):
        return _derived_async(async_sessionmaker(source, expire_on_commit=False))
    if isinstance(source, sessionmaker):
        return _derived(cast("sessionmaker[Session]", source))
    if isinstance(source, Engine):
        return _derived(sessionmaker(source, expire_on_commit=False))
    msg = (
        "Database() takes an AsyncEngine or an Engine, a URL, an async_sessionmaker or a "
        f"sessionmaker; got {told(source)}."
    )
    raise ConfigurationError(msg)


def _derived(factory: sessionmaker[Session]) -> sessionmaker[Any]:
    options: dict[str, Any] = {**factory.kw, "close_resets_only": False}
    return sessionmaker(class_=reporting_session_class(factory.class_), **options)


def _derived_async(factory: async_sessionmaker[AsyncSession]) -> async_sessionmaker[Any]:
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


def check_pooler(pooler: object, source: object) -> None:
    """Refuse a *pooler* that isn't known, or that *source* can't be told of any more."""
    if pooler is None:
        return
    check_choice("pooler", pooler, get_args(Pooler))
    if not isinstance(source, (str, URL)):
        msg = (
            f"pooler={pooler!r} needs a URL: what an engine was made with can't be changed. Make "
            "yours with create_async_engine(url, **pgbouncer_options(url)), and leave pooler out."
        )
        raise ConfigurationError(msg)
