"""Where in the user's code a task or a thread is waiting."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Iterator
    from types import FrameType

_LIBRARIES = tuple(
    {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        str(Path(__file__).parent),
        "<",
    }
)
"""Where the code begins that isn't the user's."""


class Place(NamedTuple):
    """A line of code."""

    function: str
    filename: str
    line: int

    def __str__(self) -> str:
        """The function, and the file by its last two names."""
        return f"{self.function} ({'/'.join(PurePath(self.filename).parts[-2:])}:{self.line})"


def place_of_task(task: asyncio.Task[Any] | None) -> Place | None:
    """The innermost line of the user's that *task* is suspended at, if it is."""
    return None if task is None else _innermost(_suspended(task.get_coro()))


def outermost_frame() -> FrameType | None:
    """The outermost frame of the user's in this thread: an endpoint, for instance."""
    frames = _running(sys._getframe())  # noqa: SLF001 - documented, of CPython
    return next((each for each in frames if _is_users(each)), None)


def place_of_thread(thread: int, outermost: FrameType | None) -> Place | None:
    """The innermost line of the user's that *thread* is at, if it is inside *outermost* still."""
    frames = _running(sys._current_frames().get(thread))  # noqa: SLF001 - documented, of CPython
    return _innermost(frames) if outermost in frames else None


def _running(frame: FrameType | None) -> list[FrameType]:
    """*frame* and those that called it, outermost first."""
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def _suspended(awaited: Any) -> Iterator[FrameType]:
    """The frames of a coroutine and of what it awaits, outermost first."""
    while awaited is not None:
        for frame_name, next_name in _AWAITING:
            frame = getattr(awaited, frame_name, None)
            if frame is not None:
                yield frame
                awaited = getattr(awaited, next_name)
                break
        else:
            return  # a future, or something that is written in C


_AWAITING = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))


def _is_users(frame: FrameType) -> bool:
    return not frame.f_code.co_filename.startswith(_LIBRARIES)


def _innermost(frames: Iterable[FrameType]) -> Place | None:
    place = None
    for frame in frames:
        if _is_users(frame):
            code = frame.f_code
            place = Place(f"{code.co_qualname}()", code.co_filename, frame.f_lineno)
    return place
