"""The benchmark runs, and what it counts exactly is as it should be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "overhead.py"
QUARTILES = 3


@pytest.fixture
def bench(tmp_path):
    """Run the benchmark on an SQLite file; return what it wrote."""

    def bench(*options: str) -> tuple[dict[str, Any], str]:
        report = tmp_path / "report.json"
        done = subprocess.run(
            [
                *(sys.executable, SCRIPT, "--quick", "--json", report, *options),
                *("--database", f"sqlite+aiosqlite:///{tmp_path / 'bench.db'}"),
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return json.loads(report.read_text()), done.stdout

    return bench


def test_costs_are_measured_beside_the_bare_app_and_by_hand(bench):
    """G5: Each row has its time, its difference from the bare app and its ratio to by hand."""
    report, printed = bench("--no-instructions", "--only", "none", "select")

    assert {"machine", "versions", "database", "wall", "cpu"} == set(report)
    for row in report["wall"]["none"], report["cpu"]["select"]:
        assert 0 < row["by hand"]
        assert 0 < row["ours"]
        assert QUARTILES == len(row["above bare"]) == len(row["ratio"])
    assert "| one SELECT |" in printed


def test_a_request_leaves_nothing_to_the_cycle_collector(bench):
    """G9: Reference counts free all of a request, whatever it did with its session."""
    report, _printed = bench("--memory")

    rows = {each["row"] for each in report["memory"]}
    assert {"none", "unused", "select", "commit", "insert"} == rows
    assert [0.0] * 2 * len(rows) == [each["cyclic"] for each in report["memory"]]
