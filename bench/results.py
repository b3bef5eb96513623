"""What was measured, in one JSON file: where, with which versions, and what came of each unit."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.measure import Json, Unit


class Results:
    """The file. A unit is written down when it is done, so that an interrupted run goes on.

    Args:
        path: Where it is; it need not exist.

        about: The machine and the versions. Results of others are left behind. `None`: those that
            are written there.

        source: The package's. What was measured of another is measured again.
    """

    def __init__(
        self, path: Path, about: Mapping[str, Any] | None, source: str | None = None
    ) -> None:
        self.path = path
        self.source = source
        self.about = dict(about or {})
        self._measures: dict[str, dict[str, Any]] = {}
        if path.exists():
            written = json.loads(path.read_text())
            if about is None:
                self.about = written["about"]
            if written["about"] == json.loads(json.dumps(self.about)):
                self._measures = written["measures"]

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
        draft.write_text(json.dumps({"about": self.about, "measures": self._measures}, indent=1))
        draft.replace(self.path)

    def found(self, measure: str) -> dict[str, Json]:
        """What the units of a measure found, by their names."""
        return {name: unit["found"] for name, unit in self._measures.get(measure, {}).items()}

    def loads(self) -> tuple[float, float]:
        """The lowest and the highest load average that there was."""
        loads = [unit["load"] for units in self._measures.values() for unit in units.values()]
        return min(loads, default=0.0), max(loads, default=0.0)


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
