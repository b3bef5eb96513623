"""What was measured, in one JSON file: where, with which versions, and what came of each unit."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.measure import Json, Unit


METHOD = 2
"""Raised where measures find other things than before, or write them down otherwise."""


TOLD = 5
"""Differences that are told of those that make results worthless."""


class Results:
    """The file. A unit is written down when it is done, so that an interrupted run goes on.

    Args:
        path: Where it is; it need not exist.

        about: The machine and the versions. `None`: those that are written there.

        source: The package's. `None`: whatever is written there.

    Attributes:
        dropped: What was left behind, and why: what was measured on another machine, of other
            versions, of another package or by another method says nothing beside the rest.
    """

    def __init__(
        self, path: Path, about: Mapping[str, Any] | None, source: str | None = None
    ) -> None:
        self.path = path
        self.source = source
        self.about = {**(about or {}), "method": METHOD}
        self.dropped: list[str] = []
        self._measures: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._take(json.loads(path.read_text()), is_any=about is None)

    def _take(self, written: dict[str, Any], *, is_any: bool) -> None:
        then: dict[str, Any] = written["about"]
        if is_any:
            self.about = {**then, "method": METHOD}
        others = _differences({"method": 1, **then}, json.loads(json.dumps(self.about)))
        units = {
            (measure, unit): told
            for measure, told_by_unit in written["measures"].items()
            for unit, told in told_by_unit.items()
        }
        if others and units:
            told = "; ".join(others[:TOLD])
            more = f"; and {len(others) - TOLD} more" if len(others) > TOLD else ""
            self.dropped = [f"all {len(units)} that were measured with {told}{more}"]
            return
        for (measure, unit), told in units.items():
            if self.source is not None and self.source != told["source"]:
                self.dropped.append(
                    f"{measure}/{unit}, measured of the package as {told['source']}, which is "
                    f"{self.source} now"
                )
            else:
                self._measures.setdefault(measure, {})[unit] = told

    def has(self, measure: str, unit: Unit) -> bool:
        """Whether that unit is done, with the very same contestants and source."""
        written = self._measures.get(measure, {}).get(unit.name, {})
        return (written.get("contestants"), written.get("source")) == (
            list(unit.contestants),
            self.source,
        )

    def put(self, measure: str, unit: Unit, found: Json) -> None:
        """Write down what a unit found."""
        self._measures.setdefault(measure, {})[unit.name] = {
            "contestants": list(unit.contestants),
            "source": self.source,
            "when": time.strftime("%Y-%m-%d %H:%M"),
            "load": round(os.getloadavg()[0], 2),
            "found": found,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f"{self.path.name}.draft")
        written = json.dumps({"about": self.about, "measures": self._measures}, indent=1)
        draft.write_text(_NUMBERS.sub(lambda found: "".join(found[0].split()), written))
        draft.replace(self.path)

    def found(self, measure: str) -> dict[str, Json]:
        """What the units of a measure found, by their names."""
        return {name: unit["found"] for name, unit in self._measures.get(measure, {}).items()}

    def loads(self) -> tuple[float, float]:
        """The lowest and the highest load average that there was."""
        loads = [unit["load"] for units in self._measures.values() for unit in units.values()]
        return min(loads, default=0.0), max(loads, default=0.0)


_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")
"""A list of numbers, which has a line."""


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], name: str = "") -> list[str]:
    """What is otherwise now, and what it was."""
    found: list[str] = []
    for key in dict.fromkeys([*then, *now]):
        before, after = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{name}{key} ")
        elif before != after:
            found.append(f"{name}{key} {before}, now {after}")
    return found


def source() -> str:
    """What tells the package's source from what it was before."""
    package = Path(__file__).parents[1] / "asgi_dbscope"
    files = sorted(package.rglob("*.py"))
    return hashlib.sha256(b"".join(each.read_bytes() for each in files)).hexdigest()[:12]


def machine() -> dict[str, Any]:
    """Where it was measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }
