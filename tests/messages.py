"""ASGI messages that an app should not send, beside those that it may."""

from collections import UserDict
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from tests.fix_asgi import body, start

Message = Any
Make = Callable[[], Message]
"""Makes a message anew: a generator among its headers is used up by whoever reads it."""


class Hostile:
    """What isn't a message, and objects to being asked."""

    def __getitem__(self, key: object) -> object:
        raise ZeroDivisionError


def generated(*headers: Any) -> Iterator[Any]:
    """Headers that can be read once."""
    yield from headers


def failing() -> Iterator[Any]:
    """Headers that can't be read."""
    yield (b"a", b"b")
    raise ValueError("no more headers")


def _heads(status: Any) -> Make:
    return lambda: {"type": "http.response.start", "status": status, "headers": []}


def _headed(headers: Callable[[], Any]) -> Make:
    return lambda: {"type": "http.response.start", "status": 200, "headers": headers()}


def _bodies(content: Any) -> Make:
    return lambda: {"type": "http.response.body", "body": content}


def _more(flag: Any) -> Make:
    return lambda: {"type": "http.response.body", "body": b"x", "more_body": flag}


def _message(message: Any) -> Make:
    return lambda: message


HEADS: dict[str, Make] = {
    "200": _heads(200),
    "404": _heads(404),
    "500": _heads(500),
    "999": _heads(999),
    "an enum": _heads(HTTPStatus.CREATED),
    "a mapping": lambda: UserDict(start()),
    "no headers": lambda: {"type": "http.response.start", "status": 200},
    "headers once": _headed(lambda: generated((b"a", b"b"))),
    "lists": _headed(lambda: ([b"a", b"b"], [b"set-cookie", b"\xff; x"])),
    "trailers": lambda: start(200, trailers=True),
    "unwelcome head": _headed(lambda: [(b"content-length", b"-1")]),
}
"""Heads that can be understood."""

MALFORMED_HEADS: dict[str, Make] = {
    "no status": lambda: {"type": "http.response.start", "headers": []},
    "status None": _heads(None),
    "status str": _heads("200"),
    "status bytes": _heads(b"200"),
    "status float": _heads(200.0),
    "status bool": _heads(True),
    "status 0": _heads(0),
    "status negative": _heads(-200),
    "status interim": _heads(103),
    "status huge": _heads(10**30),
    "headers None": _headed(lambda: None),
    "headers int": _headed(lambda: 5),
    "headers str": _headed(lambda: "abc"),
    "headers dict": _headed(lambda: {b"ab": b"c"}),
    "headers of bytes": _headed(lambda: [b"ab"]),
    "headers of singles": _headed(lambda: [(b"a",)]),
    "headers of triples": _headed(lambda: [(b"a", b"b", b"c")]),
    "headers of str": _headed(lambda: [("a", "b")]),
    "header value int": _headed(lambda: [(b"a", 1)]),
    "header name int": _headed(lambda: [(1, b"a")]),
    "header name empty": _headed(lambda: [(b"", b"x")]),
    "header name with a space": _headed(lambda: [(b"a b", b"x")]),
    "header name with a line break": _headed(lambda: [(b"a\nb", b"x")]),
    "header value with a line break": _headed(lambda: [(b"a", b"x\r\nset-cookie: y")]),
    "header value with NUL": _headed(lambda: [(b"a", b"x\0")]),
    "headers that fail": _headed(failing),
}
"""Heads of which nobody can tell whether they stand for a success, or that can't be sent."""

BODIES: dict[str, Make] = {
    "more": lambda: body(b"x", more=True),
    "last": body,
    "bytearray": _bodies(bytearray(b"x")),
    "memoryview": _bodies(memoryview(b"x")),
    "no body": lambda: {"type": "http.response.body"},
    "last by None": _more(None),
    "last by int": _more(0),
    "path": lambda: {"type": "http.response.pathsend", "path": "/a/file"},
    "file": lambda: {"type": "http.response.zerocopysend", "file": 3},
    "unwelcome body": _bodies(b"too long"),
}
"""Messages of a body that can be understood."""

TRAILERS: dict[str, Make] = {
    "last trailers": lambda: {"type": "http.response.trailers", "headers": [(b"a", b"b")]},
    "more trailers": lambda: {
        "type": "http.response.trailers",
        "headers": [],
        "more_trailers": True,
    },
}
"""Trailers that can be understood."""

UNWELCOME = {"unwelcome head", "unwelcome body"}
"""What only the server finds out to be wrong."""

MALFORMED_BODIES: dict[str, Make] = {
    "body None": _bodies(None),
    "body str": _bodies("text"),
    "body int": _bodies(5),
    "body list": _bodies([1]),
    "path empty": lambda: {"type": "http.response.pathsend", "path": ""},
    "path with NUL": lambda: {"type": "http.response.pathsend", "path": "/a\0"},
}
"""Last messages of a body that can't be sent."""

STRANGE: dict[str, Make] = {
    "None": _message(None),
    "int": _message(5),
    "str": _message("http.response.start"),
    "list": list,
    "tuple": _message(("type", "http.response.start")),
    "hostile": Hostile,
    "empty": dict,
    "no type": lambda: {"status": 200, "headers": []},
    "keys of bytes": lambda: {b"type": b"http.response.start", b"status": 200},
    "type None": lambda: {"type": None},
    "type bytes": lambda: {"type": b"http.response.start", "status": 200},
    "type int": lambda: {"type": 5},
    "type list": lambda: {"type": []},
    "type dict": lambda: {"type": {}},
    "unknown": lambda: {"type": "http.response.unheard-of"},
    "websocket's": lambda: {"type": "websocket.accept"},
    "lifespan's": lambda: {"type": "lifespan.startup.complete"},
    "the server's": lambda: {"type": "http.disconnect"},
    "push": lambda: {"type": "http.response.push", "path": 5},
    "hint": lambda: {"type": "http.response.early_hint", "links": None},
    "debug": lambda: {"type": "http.response.debug"},
}
"""What is no part of a head or a body."""

RECEIVED: dict[str, Make] = {
    "request": lambda: {"type": "http.request", "body": b"", "more_body": False},
    "disconnect": lambda: {"type": "http.disconnect"},
    "None": _message(None),
    "list": list,
    "empty": dict,
    "type int": lambda: {"type": 5},
    "type list": lambda: {"type": []},
    "body str": lambda: {"type": "http.request", "body": "text"},
    "hostile": Hostile,
}
"""What a server may hand over, or shouldn't."""


# --------------------------------------------------------------------------------------
# Every field of every message, left out or wrong
# --------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "zero": 0,
    "int": 5,
    "negative": -1,
    "float": 1.5,
    "str": "text",
    "bytes": b"text",
    "nothing": [],
    "list of str": ["text"],
    "dict": {},
    "hostile": Hostile(),
}
"""Values for a field; of some types they are right."""

FLAG = {"None", "True", "zero", "nothing", "dict"}
HEADERS = {"nothing", "dict"}
NUMBER = {"None", "zero", "int"}

FIELDS: dict[str, dict[str, set[str]]] = {
    "http.response.start": {
        "status": set(),
        "headers": {*HEADERS, "left out"},
        "trailers": {*FLAG, "left out"},
    },
    "http.response.body": {"body": {"bytes", "left out"}, "more_body": {*FLAG, "left out"}},
    "http.response.trailers": {"headers": HEADERS, "more_trailers": {*FLAG, "left out"}},
    "http.response.pathsend": {"path": {"str"}},
    "http.response.zerocopysend": {
        "file": {"zero", "int"},
        "offset": {*NUMBER, "left out"},
        "count": {*NUMBER, "left out"},
        "more_body": {*FLAG, "left out"},
    },
}
"""What each message that a transaction can depend on has in it, and what is right of that."""

FINE: dict[str, Any] = {"status": 200, "headers": [], "body": b"", "path": "/a/file", "file": 3}
"""A right value for each field that some message must have."""

FLAGS = ("more_body", "more_trailers")


def _with(kind: str, field: str, wrong: str) -> Make:
    message = {"type": kind} | {name: FINE[name] for name in FIELDS[kind] if name in FINE}
    message.pop(field, None)
    return lambda: message | ({} if wrong == "left out" else {field: WRONG[wrong]})


FIELD_MESSAGES: dict[str, Make] = {
    f"{kind}, {field}: {wrong}": _with(kind, field, wrong)
    for kind, fields in FIELDS.items()
    for field in fields
    for wrong in (*WRONG, "left out")
}
"""A message for each value of each field."""


def _wrong(fields: Callable[[str], bool]) -> set[str]:
    return {
        f"{kind}, {field}: {wrong}"
        for kind, rights in FIELDS.items()
        for field, right in rights.items()
        for wrong in (*WRONG, "left out")
        if wrong not in right and fields(field)
    }


WRONG_FLAGS = _wrong(lambda field: field in FLAGS)
"""The messages of which servers don't agree whether another one follows."""

MALFORMED = {*MALFORMED_HEADS, *MALFORMED_BODIES, *_wrong(lambda _: True)}
"""All that make no sense."""
