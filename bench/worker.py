"""A contestant in a process of its own: the runner says which function of a measure it runs.

One process each, so that nobody pays for another's imports, listeners and garbage, and nobody's
pins bind the others. Beside it there may be those that it is compared with: the bare app, say. The
requests and answers are lines of JSON on stdin and stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

# The installed package is what is measured; the checkout serves where none is installed.
sys.path.append(str(Path(__file__).parents[1]))

from bench.apps import Setup
from bench.contestants import by_name
from bench.served import Served

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType
    from typing import IO

    from bench.contestant import Contestant

P = ParamSpec("P")
T = TypeVar("T")
LOOPS = ("asyncio", "uvloop")


class WorkerFailedError(Exception):
    """A contestant's process ended, or its function raised."""


class Worker:
    """The process of one contestant, seen from the runner.

    Args:
        contestant: Whose app it has.

        python: The interpreter of the contestant's environment.

        setup: What the app is made with.

        loop: One of `LOOPS`.

        wrapper: What starts the interpreter: valgrind and its options, say.

        source: A directory whose packages come before those that are installed.

        beside: Whose apps are in the same process, each with an engine of its own.

        start: Which of several processes of the same it is: `PYTHONHASHSEED`, and in which order
            the apps are made.
    """

    def __init__(
        self,
        contestant: Contestant,
        python: Path,
        setup: Setup,
        *,
        loop: str = "asyncio",
        wrapper: Sequence[str | Path] = (),
        source: Path | None = None,
        beside: Sequence[Contestant] = (),
        start: int = 0,
    ) -> None:
        self.contestant = contestant
        order = {
            "name": contestant.name,
            "beside": [each.name for each in beside],
            "start": start,
            "setup": dataclasses.asdict(setup),
            "loop": loop,
        }
        self._environ = {**os.environ, "PYTHONHASHSEED": str(start)}
        if source is not None:
            self._environ["PYTHONPATH"] = str(source)
        self._command = [*wrapper, python, "-P", __file__, json.dumps(order)]

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self._environ,
        )
        return self

    def call(
        self,
        function: Callable[Concatenate[Served, P], Awaitable[T]],
        *arguments: P.args,
        **keywords: P.kwargs,
    ) -> T:
        """Have it run a function of a module, with its app; the result comes as JSON."""
        assert not keywords, "positional arguments only"
        stdin, stdout = _pipe(self._process.stdin), _pipe(self._process.stdout)
        name = f"{function.__module__}:{function.__qualname__}"
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps([name, arguments]) + "\n")
            stdin.flush()
        line = stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise WorkerFailedError(f"{self.contestant.name}, {name}:\n{self._log.read()}")
        result: T = json.loads(line)
        return result

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate()
        self._log.close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


async def _work(order: dict[str, Any], answers: IO[str]) -> None:
    setup = Setup(**order["setup"])
    names: list[str] = [order["name"], *order["beside"]]
    made: dict[int, Served] = {}
    for turn in range(len(names)):
        place = (turn + order["start"]) % len(names)
        made[place] = Served(by_name(names[place]).make(setup))
    served = made.pop(0)
    served.beside = {names[place]: each for place, each in made.items()}
    async with contextlib.AsyncExitStack() as stack:
        for each in (served, *made.values()):
            await stack.enter_async_context(each.lifespan())
        for line in sys.stdin:  # blocking: nothing else is to happen meanwhile
            function, arguments = json.loads(line)
            module, _, attribute = function.partition(":")
            result = await getattr(import_module(module), attribute)(served, *arguments)
            answers.write(json.dumps(result) + "\n")
            answers.flush()
        for each in (served, *made.values()):
            disposing: Any = each.engine.dispose()
            if disposing is not None:
                await disposing


def main() -> None:
    order = json.loads(sys.argv[1])
    # Whatever an app prints is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    factory = import_module("uvloop").new_event_loop if order["loop"] == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_work(order, answers))


if __name__ == "__main__":
    main()
