"""What the app's messages say. It may have sent anything: what isn't understood decides nothing.

A message on which nothing depends goes to the server as it is, which knows best how to object. One
that a transaction depends on has to be what ASGI says it is, or the transaction is rolled back and
the message kept: some servers are lenient, and would tell the client of a success.
"""

from __future__ import annotations

from collections.abc import Container
from string import ascii_letters, digits
from typing import TYPE_CHECKING, Any, NoReturn

from asgi_dbscope._text import label_of
from asgi_dbscope.errors import MalformedMessageError

if TYPE_CHECKING:
    from asgi_dbscope._asgi import Message, Scope

_SPAN = ("offset", "count")
"""What says which part of a file is sent."""

FINAL = range(200, 1000)
"""Statuses that a response can have: three digits, and none that announces another response."""

_BODY_MESSAGES = frozenset({"http.response.body", "http.response.zerocopysend"})

_MORE = {**dict.fromkeys(_BODY_MESSAGES, "more_body"), "http.response.trailers": "more_trailers"}
"""What says, by a message's type, that another one follows."""

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


def offers(scope: Scope, extension: str) -> bool:
    """Whether the server has *extension*."""
    extensions = scope.get("extensions")
    return isinstance(extensions, Container) and extension in extensions


def promises_trailers(head: Message, scope: Scope) -> bool:
    """Whether trailers follow the body: the app says so, and the server has them."""
    return bool(head.get("trailers", False)) and offers(scope, "http.response.trailers")


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
    if _is_unclear(message.get("trailers")):
        _refuse(scope, "a response head whose trailers are neither True nor False")
    return status, _read_headers(message, scope, "a response head")


def _read_headers(message: Message, scope: Scope, what: str) -> tuple[tuple[bytes, bytes], ...]:
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
                _refuse(scope, f"{what} with a header that HTTP has no way to send")
    except MalformedMessageError:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, it gives no headers
        _refuse(scope, f"{what} whose headers aren't pairs of byte strings")
    return headers


def refuse_second_head(scope: Scope) -> NoReturn:
    """Refuse a head of which it isn't known whether the server has taken one before it.

    Raises:
        MalformedMessageError: Always.
    """
    _refuse(scope, "a second response head")


def check_body(kind: str | None, message: Message, scope: Scope, *, is_last: bool) -> None:
    """Check a message that is sent while a transaction of the body is open.

    Raises:
        MalformedMessageError: If no server could send it, or servers would take it for different
            things.
    """
    more = _MORE.get(kind or "")
    if more is not None and _is_unclear(message.get(more)):
        _refuse(scope, f"a message whose {more} is neither True nor False")
    if not is_last:
        return
    if kind == "http.response.body":
        content = message.get("body", b"")
        if not isinstance(content, (bytes, bytearray, memoryview)):
            _refuse(scope, f"a body of type {type(content).__name__}, which are no bytes")
    elif kind == "http.response.trailers":
        if "headers" not in message:
            _refuse(scope, "trailers without headers")
        _read_headers(message, scope, "trailers")
    else:
        _check_file(kind or "", message, scope)


def _check_file(kind: str, message: Message, scope: Scope) -> None:
    """Check the message by which the server is to send a file."""
    if not offers(scope, kind):
        _refuse(scope, f"{kind}, which the server has not offered")
    if kind == "http.response.pathsend":
        path = message.get("path")
        if not isinstance(path, str) or not path or "\0" in path:
            _refuse(scope, f"a path of type {type(path).__name__}, which is none")
        return
    file = message.get("file")
    if not (_is_number(file) or hasattr(file, "fileno")):
        _refuse(scope, f"a file of type {type(file).__name__}, which is none")
    if not all(message.get(name) is None or _is_number(message[name]) for name in _SPAN):
        _refuse(scope, "a file whose offset or count is no number")


def _is_unclear(flag: object) -> bool:
    """Whether servers read *flag* differently: whether it is true, or whether it is ``True``."""
    return bool(flag) and flag is not True


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse(scope: Scope, what: str) -> NoReturn:
    msg = (
        f"{label_of(scope)}: the app sent {what}. A transaction depends on this message, so it was "
        "rolled back, and the message is not passed on. ASGI wants one head, an int from 200 to "
        "999 as status, pairs of byte strings as headers, bytes as body, True or False as flags."
    )
    raise MalformedMessageError(msg)
