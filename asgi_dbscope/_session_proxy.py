"""``db.session_proxy``: a session that stands for the current scope's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar, cast, overload

from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import ScopedRegistry

from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from asgi_dbscope._database import Database

AS = TypeVar("AS", bound=AsyncSession)
SS = TypeVar("SS", bound=Session)


class SessionProxy:
    """The attribute :attr:`Database.session_proxy`, typed as the database is."""

    @overload
    def __get__(self, database: Database[AS], owner: object) -> async_scoped_session[AS]: ...

    @overload
    def __get__(self, database: Database[SS], owner: object) -> scoped_session[SS]: ...

    @overload
    def __get__(self, database: None, owner: object) -> Self: ...

    def __get__(self, database: Any, owner: object) -> Any:
        if database is None:
            return self
        # Found there, from now on, before this is.
        attributes = cast("dict[str, Any]", vars(database))
        return attributes.setdefault("session_proxy", _make_session_proxy(database))


def _make_session_proxy(database: Database[Any]) -> Any:
    kind: Any = _SessionProxy if database.is_sync else _AsyncSessionProxy
    proxy = kind(database.session_factory, scopefunc=lambda: None)
    proxy.registry = _CurrentSession(database)
    return proxy


class _AsyncSessionProxy(async_scoped_session[Any]):
    def __deepcopy__(self, memo: object) -> Self:
        """Itself: containers copy what their providers are given."""
        return self


class _SessionProxy(scoped_session[Any]):
    def __deepcopy__(self, memo: object) -> Self:
        """Itself: containers copy what their providers are given."""
        return self


class _CurrentSession(ScopedRegistry[Any]):
    """The registry of a ``session_proxy``: the current scope is the only one it knows."""

    def __init__(self, database: Database[Any]) -> None:
        super().__init__(database.session_factory, lambda: None)
        self._database = database

    def __call__(self) -> Any:
        return self._database.session

    def has(self) -> bool:
        # So that session_proxy.remove() leaves the session to its scope.
        return False

    def set(self, obj: Any) -> None:  # noqa: ARG002 - the base class's signature
        msg = "The session of a scope can't be configured through session_proxy; use db.session."
        raise ConfigurationError(msg)

    def clear(self) -> None:
        """Do nothing: the scope ends its session."""
