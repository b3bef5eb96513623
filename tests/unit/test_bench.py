"""The benchmarks run, and what they count exactly is as it should be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.once

BENCH = Path(__file__).parents[2] / "bench"
QUARTILES = 3


@pytest.fixture
def bench(tmp_path):
    """Run a benchmark on an SQLite file; return what it wrote."""

    def bench(
        *options: str, script: str = "overhead.py", database: str | None = None
    ) -> tuple[dict[str, Any], str]:
        report = tmp_path / "report.json"
        done = subprocess.run(
            [
                *(sys.executable, BENCH / script, "--quick", "--json", report, *options),
                *("--database", database or f"sqlite+aiosqlite:///{tmp_path / 'bench.db'}"),
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


def test_blocks_are_measured_beside_what_they_stand_for(bench):
    """Each kind of block has its time, beside plain SQLAlchemy and above no block at all."""
    report, printed = bench("--no-instructions", script="blocks.py")

    rows = {"none", "joined", "decorated", "read", "nested", "new"}
    assert rows == set(report["cpu"]) == set(report["wall"])
    assert all(QUARTILES == len(row["above bare"]) for row in report["cpu"].values())
    assert "| NESTED, around one SELECT |" in printed


def test_a_block_leaves_nothing_to_the_cycle_collector(bench):
    """G9: Reference counts free all of a block, whether it joins or has an end of its own."""
    report, _printed = bench("--memory", script="blocks.py")

    assert 12 == len(report["memory"])
    assert [0.0] * 12 == [each["cyclic"] for each in report["memory"]]


def test_asking_for_the_transaction_is_measured_beside_not_asking(bench, postgres_url):
    """G15: `resolve_in_doubt` has its costs, beside the same requests without it."""
    report, printed = bench("--no-instructions", script="in_doubt.py", database=postgres_url)

    assert {"none", "select", "insert"} == set(report["cpu"])
    assert "| one INSERT, committed |" in printed
