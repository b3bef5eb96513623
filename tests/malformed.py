"""Apps that send messages that no app should send, and a model of what comes of it."""

from dataclasses import dataclass, field
from typing import Literal

from hypothesis import strategies as st

from tests.messages import (
    BODIES,
    FIELD_MESSAGES,
    HEADS,
    MALFORMED,
    MALFORMED_BODIES,
    MALFORMED_HEADS,
    RECEIVED,
    STRANGE,
    TRAILERS,
    UNWELCOME,
    WRONG_FLAGS,
    Make,
    Message,
)

FILES = ("http.response.pathsend", "http.response.zerocopysend")
"""Messages that a server takes only where it has offered them."""


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

    has_extensions: bool
    expects: Literal["head", "body", "trailers", "nothing"] = "head"
    has_trailers: bool = False

    def check(self, message: Message, names: dict[int, str]) -> None:
        """Object to what is malformed, or comes at the wrong time."""
        kind, name = kind_of(message), names.get(id(message), "")
        if name in MALFORMED or name in UNWELCOME:
            raise ServerError(f"can't send {name}")
        if self.expects == "head" and kind == "http.response.start":
            self.expects = "body"
            self.has_trailers = self.has_extensions and bool(message.get("trailers"))
        elif self.expects == "body" and (
            kind == "http.response.body" or (kind in FILES and self.has_extensions)
        ):
            if ends_body(kind, message):
                self.expects = "trailers" if self.has_trailers else "nothing"
        elif self.expects == "trailers" and kind == "http.response.trailers":
            if ends_trailers(kind, message):
                self.expects = "nothing"
        else:
            raise ServerError(f"expected {self.expects}")


def ends_body(kind: object, message: Message) -> bool:
    """Whether no more of the body follows."""
    if kind in ("http.response.body", "http.response.zerocopysend"):
        return not message.get("more_body")
    return kind == "http.response.pathsend"


def ends_trailers(kind: object, message: Message) -> bool:
    """Whether no more trailers follow."""
    return kind == "http.response.trailers" and not message.get("more_trailers")


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

        has_extensions: Whether the server has trailers and can send files by itself.
    """

    steps: tuple[Step, ...]
    swallows: bool
    is_strict: bool
    has_extensions: bool


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
        _sends(TRAILERS),
        _sends(FIELD_MESSAGES),
        _sends(STRANGE),
        st.sampled_from(receives),
        st.just(Step("raise")),
    )
    return st.builds(
        Program,
        steps=st.lists(step, max_size=12).map(tuple),
        swallows=st.booleans(),
        is_strict=st.booleans(),
        has_extensions=st.booleans(),
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
    is_replayable: bool = False
    committed: list[int] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    at_heads: list[list[int]] = field(default_factory=list)
    error: str | None = None

    def __post_init__(self) -> None:
        self.phase: Literal["response", "body", "trailers", "after"] = "response"
        self.open: list[int] | None = None
        self.has_session = False
        self.is_head_taken = False
        self.is_refused = False
        self.rules = Rules(self.program.has_extensions)
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
            self.has_session = True
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
        is_watched = self._is_watched()
        if self.is_refused and not self._answers(kind, message):
            return "refused"
        before = self.phase
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
                if is_watched:
                    self.phase = before
                return "server"
        self.is_head_taken = self.is_head_taken or (
            is_watched and (before, self.phase) == ("response", "body")
        )
        return None

    def _is_watched(self) -> bool:
        """Whether it is seen what becomes of a message: not where nothing depends on it."""
        is_first = self.is_replayable and self.phase == "response" and self.has_session
        return self.open is not None or self.is_refused or is_first

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
            if is_open and name in MALFORMED:
                return False
            self._settle(commits=not is_open or message["status"] < 500)
            self.phase = "body"
            self.has_trailers = self.rules.has_extensions and bool(message.get("trailers"))
        elif self.phase in {"body", "trailers"}:
            return self._understands_body(name, kind, message)
        return True

    def _understands_body(self, name: str, kind: object, message: Message) -> bool:
        is_open = self.open is not None
        is_second = kind == "http.response.start" and not self.is_head_taken
        if is_open and (is_second or name in WRONG_FLAGS):
            return False
        if self.has_trailers:
            is_last = self.phase == "trailers" and ends_trailers(kind, message)
            if ends_body(kind, message):
                self.phase = "trailers"
        else:
            is_last = ends_body(kind, message)
        if is_last:
            has_it = kind not in FILES or self.rules.has_extensions
            if is_open and (name in MALFORMED or not has_it):
                return False
            self._settle(commits=True)
            self.phase = "after"
        return True

    def _settle(self, *, commits: bool) -> None:
        if commits:
            self.committed += self.open or []
        self.open = None

    def _end(self, raised: str | None) -> None:
        if self.is_refused:
            raised = "refused"
        self.error = raised
        self._settle(commits=raised is None and self.phase == "after")
