"""Type checkers read this file, nobody runs it: options of endpoints, and commit policies."""

from collections.abc import Coroutine
from typing import Any, assert_type

from fastapi import Depends, FastAPI

from asgi_dbscope import (
    CommitPolicy,
    ResponseHead,
    commit_on_success,
    commit_unless_error,
    session_options,
)


@session_options(mode="manual", read_only=True, isolation_level="SERIALIZABLE")
async def coroutine(account: int, *, note: str = "") -> str:
    """A decorated coroutine function."""
    return f"{account} {note}"


@session_options(commit_policy=commit_on_success, stream="hold", database="reports")
def plain(account: int, *, note: str = "") -> str:
    """A decorated function."""
    return f"{account} {note}"


async def signature_is_kept() -> None:
    """A decorated endpoint is called as before, and gives what it gave."""
    pending: Coroutine[Any, Any, str] = coroutine(1, note="x")
    assert_type(await pending, str)
    assert_type(await coroutine(1, note="x"), str)
    assert_type(plain(1, note="x"), str)
    plain("1")  # type: ignore[arg-type]
    plain(1, nte="x")  # type: ignore[call-arg]


def options_are_checked() -> None:
    """A wrong option is told by the type checker too."""
    session_options(mode="atomic")  # type: ignore[arg-type]
    session_options(stream="keep")  # type: ignore[arg-type]
    session_options(read_only="yes")  # type: ignore[arg-type]
    session_options("manual")  # type: ignore[call-arg]


async def options_are_a_dependency(app: FastAPI) -> None:
    """`.apply` is for `Depends`, ahead of what uses the session."""
    options = session_options(read_only=True)
    app.get("/", dependencies=[Depends(options.apply)])(coroutine)
    await options.apply()


def commit_created_only(head: ResponseHead) -> bool:
    """A policy sees status, headers and exception."""
    assert_type(head.status, int)
    assert_type(head.headers, tuple[tuple[bytes, bytes], ...])
    assert_type(head.exception, BaseException | None)
    assert_type(head.raised, bool)
    return head.status == 201


POLICIES: list[CommitPolicy] = [commit_unless_error, commit_on_success, commit_created_only]
