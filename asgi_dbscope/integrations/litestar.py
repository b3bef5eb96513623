"""Litestar: let it render a failed commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asgi_dbscope._asgi import Scope


def forget_head(scope: Scope) -> None:
    """Take back Litestar's note, kept in the ASGI scope, that a response head was sent.

    It is made before the head is sent, and this one was not: with the note Litestar would answer
    an error with "Exception caught after response started", without it by its own handlers.
    """
    connection_state = scope.get("state", {}).get("_ls_connection_state")
    if hasattr(connection_state, "response_started"):
        connection_state.response_started = False
