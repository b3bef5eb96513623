"""What an engine has to be told when a pooler stands between it and the database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import URL

Pooler = Literal["pgbouncer"]
"""What stands between an engine and its database."""


def _unnamed() -> str:
    """The name of PostgreSQL's unnamed statement, which the next one replaces."""
    return ""


_CONNECT_ARGS: dict[str, dict[str, Any]] = {
    # Nothing of a statement stays on the server: where asyncpg keeps no cache it sends an unnamed
    # statement's text again together with its parameters, so also outside of a transaction it
    # doesn't matter which server connection the pooler chooses.
    "asyncpg": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": _unnamed,
    },
    "psycopg": {"prepare_threshold": None},
    "psycopg_async": {"prepare_threshold": None},
}

_OF_THE_SESSION = ("server_settings", "options")
"""How drivers set what is to hold for a session: asyncpg by a dictionary, libpq by ``-c``."""

_CARRIED = frozenset(
    {"application_name", "client_encoding", "datestyle", "timezone", "standard_conforming_strings"}
)
"""The settings that PgBouncer takes along to each server connection."""


def read_url(url: URL | str) -> URL:
    """*url*, parsed.

    Raises:
        ConfigurationError: If it can't be. What SQLAlchemy says of it may quote a part of the
            password, and isn't shown.
    """
    try:
        return make_url(url)
    except (ArgumentError, ValueError):
        msg = (
            "The database's URL can't be read; it looks like "
            "'postgresql+asyncpg://user:password@host/name' or 'sqlite+aiosqlite:///file.db'. "
            "In a password '@', ':', '/' and '%' are written %40, %3A, %2F and %25."
        )
        raise ConfigurationError(msg) from None


def pgbouncer_options(
    url: URL | str, *, connect_args: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """The options of an engine that reaches PostgreSQL by PgBouncer in transaction mode.

    There each transaction may get another server connection, and a statement that was prepared on
    one is unknown on the next. With these options none is prepared beyond its own use::

        url = "postgresql+asyncpg://shop@pooler:6432/shop"
        engine = create_async_engine(url, **pgbouncer_options(url, pool_size=20))

    For ``create_engine()`` as well, with psycopg. ``Database(url, pooler="pgbouncer")`` uses them
    by itself.

    Args:
        url: The engine's; its driver is asyncpg or psycopg.

        connect_args: More for the driver's ``connect()``.

        options: More for the engine; handed back as they are.

    Returns:
        What to give to ``create_async_engine()`` or ``create_engine()`` beside *url*.

    Raises:
        ConfigurationError: If the driver is another one, or an argument keeps prepared statements
            or settings of the session.
    """
    parsed = read_url(url)
    needed = _CONNECT_ARGS.get(parsed.drivername.rpartition("+")[2])
    if needed is None or parsed.get_backend_name() != "postgresql":
        msg = (
            "PgBouncer's options are known for the drivers postgresql+asyncpg and "
            f"postgresql+psycopg; this URL says {parsed.drivername}."
        )
        raise ConfigurationError(msg)
    given = connect_args or {}
    for name, value in needed.items():
        if str(parsed.query.get(name, value)) != str(value) or given.get(name, value) != value:
            msg = (
                f"{name} can't be chosen behind PgBouncer in transaction mode: a statement that "
                "was prepared on one server connection is unknown on the next. Leave it out."
            )
            raise ConfigurationError(msg)
    for name in _OF_THE_SESSION:
        settings = {each.lower() for each in given.get(name) or ()}
        if name in parsed.query or not _CARRIED.issuperset(settings):
            msg = (
                f"{name} can't be used behind PgBouncer in transaction mode: a setting of the "
                "session doesn't come along from one server connection to the next, and PgBouncer "
                "refuses it, or ignores it. Leave it out, and give the setting to the role in the "
                "database: ALTER ROLE shop SET search_path = 'shop'."
            )
            raise ConfigurationError(msg)
    return {**options, "connect_args": {**given, **needed}}
