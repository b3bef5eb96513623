"""What the app's messages say. It may have sent anything: what isn't understood decides nothing.

A message on which nothing depends goes to the server as it is, which knows best how to object. One
that a transaction depends on has to be what ASGI says it is, or the transaction is rolled back and
the message kept: some servers are lenient, and would tell the client of a success.
"""

from __future__ import annotations

from string import ascii_letters, digits
from typing import TYPE_CHECKING, Any, NoReturn

from asgi_dbscope._text import label_of
from asgi_dbscope.errors import MalformedMessageError

if TYPE_CHECKING:
    from asgi_dbscope._asgi import Message, Scope

FINAL = range(200, 1000)
"""Statuses that a response can have: three digits, and none that announces another response."""

_BODY_MESSAGES = frozenset({"http.response.body", "http.response.zerocopysend"})

_TOKEN = (ascii_letters + digits + "!#$%&'*+-.^_`|~").encode()
"""What the name of a header is made of."""

_LINE_BREAKS = b"\0\r\n"
"""What no value of a header may have in it."""


def type_of(message: Any) -> str | None:
    """The type of *message*; ``None`` if it has none that could be meant."""
    try:
        kind = message["type"]
    except Exception:  # noqa: BLE001 - whatever it is, it is no message
        return None
    return kind if isinstance(kind, str) else None


def ends_body(kind: str | None, message: Message) -> bool:
    """Whether no more of the body follows."""
    if kind in _BODY_MESSAGES:
        return not message.get("more_body", False)
    return kind == "http.response.pathsend"


def promises_trailers(head: Message, scope: Scope) -> bool:
    """Whether trailers follow the body: the app says so, and the server has them."""
    has_them = "http.response.trailers" in (scope.get("extensions") or ())
    return has_them and bool(head.get("trailers", False))


def ends_trailers(kind: str | None, message: Message) -> bool:
    """Whether no more trailers follow."""
    return kind == "http.response.trailers" and not message.get("more_trailers", False)


def read_head(message: Message, scope: Scope) -> tuple[int, tuple[tuple[bytes, bytes], ...]]:
    """The status and headers of a response head on which a transaction depends.

    Raises:
        MalformedMessageError: If they aren't what ASGI and HTTP say.
    """
    status = message.get("status")
    if not isinstance(status, int) or status not in FINAL:
        is_short = isinstance(status, int) and abs(status) < FINAL.stop
        shown = str(status) if is_short else f"of type {type(status).__name__}"
        _refuse(scope, f"a response head with a status {shown}, which is none")
    given: Any = message.get("headers", ())
    try:
        headers: tuple[tuple[bytes, bytes], ...] = tuple(given)
        if iter(given) is given:  # it is used up now
            message["headers"] = list(headers)
        if headers:
            names, values = zip(*headers, strict=True)
            value = b"".join(values)
            are_names = b"" not in names and not b"".join(names).translate(None, _TOKEN)
            if not are_names or len(value.translate(None, _LINE_BREAKS)) < len(value):
                _refuse(scope, "a response head with a header that HTTP has no way to send")
    except MalformedMessageError:
        raise
    except (TypeError, ValueError):
        _refuse(scope, "a response head whose headers aren't pairs of byte strings")
    return status, headers


def check_last_message(kind: str | None, message: Message, scope: Scope) -> None:
    """Check the message that ends a body on which a transaction depends.

    Raises:
        MalformedMessageError: If no server could send it.
    """
    if kind == "http.response.body":
        content = message.get("body", b"")
        if not isinstance(content, (bytes, bytearray, memoryview)):
            _refuse(scope, f"a body of type {type(content).__name__}, which are no bytes")


def _refuse(scope: Scope, what: str) -> NoReturn:
    msg = (
        f"{label_of(scope)}: the app sent {what}. A transaction depends on this message, so it was "
        "rolled back, and the message is not passed on. ASGI wants an int from 200 to 999 as "
        "status, pairs of byte strings as headers, bytes as body."
    )
    raise MalformedMessageError(msg)
