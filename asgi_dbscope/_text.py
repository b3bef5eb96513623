"""Text from outside on its way into logs, messages and SQL: one short line, and no secrets."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import URL

    from asgi_dbscope._asgi import Scope

LONGEST = 200
"""The most characters of a path or a label that are shown."""

_SHOWN = frozenset({"host", "port"})
"""What is shown of a URL's query; anything else may be a password by some driver's name for it."""


def one_line(text: str) -> str:
    """*text* as it can stand in a line of a log: what isn't printable is escaped, the rest is cut.

    A path comes from a client, percent-decoded: with a line break in it, it would write log lines
    of its own; with a right-to-left override it would look like another one.
    """
    text = text[: LONGEST + 1]
    if not text.isprintable():
        text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def label_of(asgi_scope: Scope) -> str:
    """What logs and errors call a request: ``GET /orders``."""
    method = asgi_scope.get("method", "WEBSOCKET" if asgi_scope.get("type") == "websocket" else "?")
    return one_line(f"{method} {asgi_scope.get('path', '?')}")


def ascii_line(text: str) -> str:
    """:func:`one_line` in ASCII, for SQL: whatever the encoding of the connection is, it has that.

    It can't end a comment that it stands in: neither ``*/`` nor a line break is left, and nested
    ``/*`` neither.
    """
    return one_line(text).replace("*", "").encode("ascii", "backslashreplace").decode()


def name_of(function: Any) -> str:
    """What *function* is called; its arguments, where it is a ``partial``, are not for a log."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


def told(value: Any) -> str:
    """*value* for an error message: what may hold a password is not shown."""
    url: Any = getattr(value, "url", value)
    if hasattr(url, "render_as_string"):
        return masked(url)
    text = repr(value)
    if "://" in text:
        return f"a {type(value).__name__}, not shown because it may hold a password"
    return one_line(text)


def masked(url: URL) -> str:
    """*url* without its secrets: the password, and what drivers take by the query."""
    query = {key: value if key in _SHOWN else "***" for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)
