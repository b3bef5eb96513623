"""Litestar: let it render a failed commit, and serve a request anew."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_dbscope._asgi import Scope


def forget_head(scope: Scope) -> None:
    """Take back Litestar's note, kept in the ASGI scope, that a response head was sent.

    It is made before the head is sent, and this one was not: with the note Litestar would answer
    an error with "Exception caught after response started", without it by its own handlers.
    """
    connection_state = _connection_state(scope)
    if hasattr(connection_state, "response_started"):
        connection_state.response_started = False


def remember_request(scope: Scope) -> Callable[[], None]:
    """What brings back what Litestar knows of a request now.

    It keeps in one object what it has read: the body, the parsed JSON, which an endpoint may have
    changed, the form with its files, which it closes when the endpoint is left.
    """
    connection_state: object = _connection_state(scope)
    names: tuple[str, ...] = getattr(connection_state, "__slots__", ())
    values = {
        name: _own(getattr(connection_state, name))
        for name in names
        if hasattr(connection_state, name)
    }

    def bring_back() -> None:
        for name, value in values.items():
            setattr(connection_state, name, _own(value))

    return bring_back


def _connection_state(scope: Scope) -> Any:
    return scope.get("state", {}).get("_ls_connection_state")


def _own(value: Any) -> Any:
    """*value*, or a copy that can be changed without the other copies."""
    return copy(cast("Any", value)) if isinstance(value, (dict, list)) else value
