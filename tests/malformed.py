"""Messages that no app should send, apps that send them, and a model of what comes of it."""

from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

from hypothesis import strategies as st

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
    "more by str": _more("no"),
    "more by int": _more(1),
    "last by None": _more(None),
    "last by int": _more(0),
    "path": lambda: {"type": "http.response.pathsend", "path": "/a/file"},
    "file": lambda: {"type": "http.response.zerocopysend", "file": 3},
}
"""Messages of a body that can be understood."""

MALFORMED_BODIES: dict[str, Make] = {
    "body None": _bodies(None),
    "body str": _bodies("text"),
    "body int": _bodies(5),
    "body list": _bodies([1]),
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
    "trailers": lambda: {"type": "http.response.trailers", "headers": None},
    "more trailers": lambda: {"type": "http.response.trailers", "more_trailers": True},
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


class ServerError(Exception):
    """What a server raises that objects."""


class AppError(Exception):
    """What an app raises by itself."""


def kind_of(message: Message) -> object:
    """The type of a message, if it has one."""
    try:
        return message["type"]
    except Exception:
        return None


@dataclass
class Rules:
    """What a strict server takes: a head, a body, its trailers, and nothing after that."""

    offers_trailers: bool
    expects: Literal["head", "body", "trailers", "nothing"] = "head"
    has_trailers: bool = False

    def check(self, message: Message, names: dict[int, str]) -> None:
        """Object to what is malformed, or comes at the wrong time."""
        kind, name = kind_of(message), names.get(id(message), "")
        is_malformed = name in MALFORMED_HEADS or name in MALFORMED_BODIES
        if self.expects == "head" and kind == "http.response.start" and not is_malformed:
            self.expects = "body"
            self.has_trailers = self.offers_trailers and bool(message.get("trailers"))
        elif self.expects == "body" and kind == "http.response.body" and not is_malformed:
            if not message.get("more_body"):
                self.expects = "trailers" if self.has_trailers else "nothing"
        else:
            raise ServerError(f"expected {self.expects}")


@dataclass(frozen=True)
class Step:
    """One thing that an app does.

    Attributes:
        verb: What.

        make: Makes the message that is sent, or received.

        name: What the message is called, as in the tables above.
    """

    verb: Literal["write", "read", "send", "receive", "raise"]
    make: Make | None = None
    name: str = ""

    def __repr__(self) -> str:
        return f"{self.verb} {self.name}".rstrip()


@dataclass(frozen=True)
class Program:
    """An app, and the server that it meets.

    Attributes:
        steps: What the app does, one after the other.

        swallows: Whether it goes on after whatever `send` raises.

        is_strict: Whether the server objects.

        offers_trailers: Whether the server has the extension.
    """

    steps: tuple[Step, ...]
    swallows: bool
    is_strict: bool
    offers_trailers: bool


def _sends(*tables: dict[str, Make]) -> st.SearchStrategy[Step]:
    steps = [Step("send", make, name) for table in tables for name, make in table.items()]
    return st.sampled_from(steps)


def programs() -> st.SearchStrategy[Program]:
    """Programs: about a half of what is sent is well-formed, or little would ever happen."""
    receives = [Step("receive", make, name) for name, make in RECEIVED.items()]
    step = st.one_of(
        st.just(Step("write")),
        st.just(Step("write")),
        st.just(Step("read")),
        _sends({"200": HEADS["200"]}),
        _sends({"more": BODIES["more"], "last": BODIES["last"]}),
        _sends(HEADS),
        _sends(BODIES),
        _sends(MALFORMED_HEADS),
        _sends(MALFORMED_BODIES),
        _sends(STRANGE),
        st.sampled_from(receives),
        st.just(Step("raise")),
    )
    return st.builds(
        Program,
        steps=st.lists(step, max_size=12).map(tuple),
        swallows=st.booleans(),
        is_strict=st.booleans(),
        offers_trailers=st.booleans(),
    )


@dataclass
class Model:
    """What comes of a program: rows, and the kind of error that reaches the server.

    Attributes:
        committed: The rows that are there in the end.

        log: For each `send` and `raise` what the app gets: an error's kind, or `sent`.

        at_heads: What was there when a head reached the server.

        error: What the server gets in the end.
    """

    program: Program
    committed: list[int] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    at_heads: list[list[int]] = field(default_factory=list)
    error: str | None = None

    def __post_init__(self) -> None:
        self.phase: Literal["response", "body", "trailers", "after"] = "response"
        self.open: list[int] | None = None
        self.is_refused = False
        self.rules = Rules(self.program.offers_trailers)
        self.has_trailers = False
        self.names: dict[int, str] = {}
        raised = None
        for number, step in enumerate(self.program.steps):
            raised = self._step(number, step)
            if raised is not None and (step.verb == "raise" or not self.program.swallows):
                break
            raised = None
        self._end(raised)

    def _step(self, number: int, step: Step) -> str | None:
        if step.verb in {"write", "read"}:
            self.open = self.open or []
            if step.verb == "write":
                self.open.append(number)
            return None
        if step.verb == "receive":
            if step.name == "disconnect" and self.phase in {"body", "trailers"}:
                self.open, self.phase = None, "after"
            return None
        got = "app" if step.verb == "raise" else self._send(step)
        self.log.append(got or "sent")
        return got

    def _send(self, step: Step) -> str | None:
        assert step.make is not None
        message = step.make()
        self.names[id(message)] = step.name
        kind = kind_of(message)
        if self.is_refused and not self._answers(kind, message):
            return "refused"
        self.is_refused = not self._understands(step.name, kind, message)
        if self.is_refused:
            self.open = None
            return "refused"
        if kind == "http.response.start":
            self.at_heads.append(list(self.committed))
        if self.program.is_strict:
            try:
                self.rules.check(message, self.names)
            except ServerError:
                return "server"
        return None

    def _answers(self, kind: object, message: Message) -> bool:
        """Whether the app answers by itself after a refusal: an error, in the place of a head."""
        if kind != "http.response.start" or self.phase != "response":
            return False
        status = message.get("status")
        return isinstance(status, int) and status >= 400

    def _understands(self, name: str, kind: object, message: Message) -> bool:
        """Settle what the message puts an end to; whether it can be understood, if that matters."""
        is_open = self.open is not None
        if self.phase == "response" and kind == "http.response.start":
            if is_open and name in MALFORMED_HEADS:
                return False
            self._settle(commits=not is_open or message["status"] < 500)
            self.phase = "body"
            self.has_trailers = self.rules.offers_trailers and bool(message.get("trailers"))
        elif self.phase == "body" and self._ends_body(kind, message):
            if self.has_trailers:
                self.phase = "trailers"
                return True
            if is_open and name in MALFORMED_BODIES:
                return False
            self._settle(commits=True)
            self.phase = "after"
        elif self.phase == "trailers" and self._ends_trailers(kind, message):
            self._settle(commits=True)
            self.phase = "after"
        return True

    @staticmethod
    def _ends_body(kind: object, message: Message) -> bool:
        if kind in ("http.response.body", "http.response.zerocopysend"):
            return not message.get("more_body")
        return kind == "http.response.pathsend"

    @staticmethod
    def _ends_trailers(kind: object, message: Message) -> bool:
        return kind == "http.response.trailers" and not message.get("more_trailers")

    def _settle(self, *, commits: bool) -> None:
        if commits:
            self.committed += self.open or []
        self.open = None

    def _end(self, raised: str | None) -> None:
        if self.is_refused:
            raised = "refused"
        self.error = raised
        self._settle(commits=raised is None and self.phase == "after")
