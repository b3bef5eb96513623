"""What we set ourselves, and whether it was met: the first table of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.estimate import Estimate, about, exactly
from bench.measures.hold import CROWDS, OCCASIONS, is_slowed
from bench.measures.instructions import REPEATS
from bench.race import Raced, above, ratio

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.results import Results

GROUP = "asgi"
"""Without a framework, whose own cost would make every ratio look better."""

OURS, BY_HAND, BARE = (f"{GROUP}.{way}" for way in ("ours", "by_hand", "bare"))

COLUMNS = ("by hand", "best other", "asgi-dbscope", "target", "")

Found = dict[str, Any]
"""What a measure found, by contestant."""

Read = Callable[["Results", str], Estimate]
"""What was measured for a contestant; a `KeyError` says that nothing was."""

NOISE = "within the noise of the target"
"""Neither met nor missed: the interval is on both sides of it."""


@dataclass(frozen=True)
class Target:
    """A figure that we set ourselves.

    Attributes:
        what: Of which request.

        shown: How a figure is written.

        goal: At most so much.

        read: Reads what was measured.
    """

    what: str
    shown: str
    goal: float
    read: Read

    def row(self, results: Results, names: Iterable[str]) -> list[str]:
        """Its row of the table; *names* are those of the contestants."""
        found = {name: self._value(results, name) for name in names if name != BARE}
        by_hand, ours = found.pop(BY_HAND, None), found.pop(OURS, None)
        measured = [each for each in found.values() if each is not None]
        best = min(measured, key=lambda each: each.value, default=None)
        return [
            self.what,
            *("" if each is None else self._told(each) for each in (by_hand, best, ours)),
            f"≤ {self.shown.format(self.goal)}",
            "not measured" if ours is None else self.verdict(ours),
        ]

    def verdict(self, ours: Estimate) -> str:
        """Whether all of what it may be is on one side."""
        if ours.high <= self.goal:
            return "met"
        return "**not met**" if ours.low > self.goal else NOISE

    def _told(self, found: Estimate) -> str:
        value, low, high = map(self.shown.format, (found.value, found.low, found.high))
        return value if found.low == found.high else f"{value} ({low} to {high})"

    def _value(self, results: Results, name: str) -> Estimate | None:
        try:
            return self.read(results, name)
        except KeyError:
            return None


def _times(results: Results, route: str, name: str) -> Sequence[Raced]:
    processes: Sequence[Raced] = results.found("latency")[f"asyncio {GROUP}"][route][name]
    return processes


def time_above_bare(route: str) -> Read:
    """Microseconds above the bare app."""
    return lambda results, name: above(_times(results, route, name), "cpu")


def time_ratio(route: str) -> Read:
    """To by hand."""
    return lambda results, name: ratio(_times(results, route, name), "cpu")


def _count(results: Results, route: str, name: str) -> float:
    counted: float = results.found("instructions")[GROUP][name][route]
    return counted


def instructions_above_bare(route: str) -> Read:
    """Thousands of instructions above the bare app."""

    def read(results: Results, name: str) -> Estimate:
        counted = _count(results, route, name)
        return about((counted - _count(results, "none", BARE)) / 1e3, REPEATS * counted / 1e3)

    return read


def instructions_ratio(route: str) -> Read:
    """To by hand."""

    def read(results: Results, name: str) -> Estimate:
        found = _count(results, route, name) / _count(results, route, BY_HAND)
        return about(found, REPEATS * found)

    return read


def server_ratio(route: str) -> Read:
    """The server's CPU, to by hand."""
    return lambda results, name: ratio(results.found("throughput")[GROUP][name][route], "cpu")


def allocated(what: str, unit: float = 1) -> Read:
    """What a request without a database allocates above the bare app."""

    def read(results: Results, name: str) -> Estimate:
        found = results.found("allocations")[GROUP]
        return exactly((found[name]["none"][what] - found[BARE]["none"][what]) / unit)

    return read


def held(route: str) -> Read:
    """Milliseconds that a connection is held after the head."""
    return lambda results, name: exactly(results.found("hold")[GROUP][name][route])


def slowed(route: str) -> Read:
    """Milliseconds that others wait longer; none, as long as they wait for no connection."""

    def read(results: Results, name: str) -> Estimate:
        waits = results.found("hold")[GROUP][name][route]
        return exactly(waits["beside"] - waits["calm"] if is_slowed(waits) else 0.0)

    return read


NONE = "no database, above the bare app"
TARGETS = (
    Target(NONE, "{:.2f} µs", 1.2, time_above_bare("none")),
    Target(NONE, "{:.1f} k instructions", 13, instructions_above_bare("none")),
    Target(NONE, "{:.1f} allocations", 8, allocated("count")),
    Target(NONE, "{:.2f} KiB", 0.8, allocated("bytes", 1024)),
    Target("session obtained, not used, above bare", "{:.1f} µs", 14, time_above_bare("unused")),
    Target("one SELECT, time to by hand", "{:.3f}", 0.96, time_ratio("select")),
    Target("one SELECT, instructions to by hand", "{:.3f}", 0.97, instructions_ratio("select")),
    Target("one INSERT + COMMIT, time to by hand", "{:.3f}", 0.97, time_ratio("insert")),
    Target(
        "one INSERT + COMMIT, instructions to by hand", "{:.3f}", 0.98, instructions_ratio("insert")
    ),
    Target(
        "one SELECT behind uvicorn, server's CPU to by hand", "{:.3f}", 1.0, server_ratio("select")
    ),
    *(
        Target(f"connection held during {title}", "{:.1f} ms more", 0, held(route))
        for route, title in OCCASIONS.items()
    ),
    *(
        Target(f"others beside {title}, pool of five", "{:.0f} ms slower", 0, slowed(route))
        for route, title in CROWDS.items()
    ),
)
