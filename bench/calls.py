"""How many calls a package makes: a number that repeats exactly, however busy the machine is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from types import FrameType, ModuleType


async def count_calls(package: ModuleType, work: Awaitable[object]) -> int:
    """Those that the package's own code makes in this thread: of its functions and of Python's."""
    assert package.__file__ is not None
    place = str(Path(package.__file__).parent)
    counted = 0

    def note(frame: FrameType, what: str, _: object) -> None:
        nonlocal counted
        if what in {"call", "c_call"} and frame.f_code.co_filename.startswith(place):
            counted += 1

    sys.setprofile(note)
    try:
        await work
    finally:
        sys.setprofile(None)
    return counted
