"""The page of the benchmarks says what was measured, and nothing that wasn't."""

import asyncio
from typing import Any

import pytest

from bench.contestant import Contestant
from bench.contestants import by_name, contestants
from bench.database import database
from bench.measure import Bench, Unit
from bench.measures import measures
from bench.measures.first_byte import first_byte
from bench.measures.hold import late_holds
from bench.measures.pool_tail import read
from bench.page import page
from bench.results import Results

ABOUT = {
    "machine": {"processor": "a processor", "cores": 2, "system": "Linux"},
    "versions": {"main": {"python": "3.12.1", "sqlalchemy": "2.1.9", "unmentioned": "1"}},
}


@pytest.fixture
def written(tmp_path):
    """The page of given results: measure, unit, what was found."""

    def written(*found: tuple[str, str, Any], known: list[Contestant] | None = None) -> str:
        results = Results(tmp_path / "results.json", ABOUT)
        for measure, unit, told in found:
            results.put(measure, Unit(unit, [*told], 0.0, lambda *_: None), told)
        return page(results, measures(), known or contestants())

    return written


def row(text: str, beginning: str) -> str:
    """The row of a table that begins so."""
    return next(line for line in text.splitlines() if line.startswith(f"| {beginning}"))


def throughput(ours: float) -> tuple[str, str, Any]:
    """By hand 100 microseconds of the server, and ours."""
    return (
        "throughput",
        "asgi",
        {
            "asgi.by_hand": {"select": [{"cpu": 100.0, "rate": 900.0}] * 3},
            "asgi.ours": {"select": [{"cpu": ours, "rate": 900.0}] * 3},
        },
    )


LATENCY = {
    route: {name: {"wall": [1.0], "cpu": [1.0]} for name in ("asgi.by_hand", "asgi.ours")}
    for route in ("none", "unused", "select", "insert")
}


@pytest.mark.parametrize(("ours", "verdict"), [(99.0, "| met |"), (101.0, "| **not met** |")])
def test_target_that_was_missed_is_said_to_be(written, ours, verdict):
    """The first table has what was measured beside its target, and says whether that is met."""
    text = written(throughput(ours), ("latency", "asyncio asgi", LATENCY))

    found = row(text, "one SELECT behind uvicorn")
    assert f"| 1.000 |  | {ours / 100:.3f} | ≤ 1.000 {verdict}" in found


def test_microseconds_above_the_bare_app_are_of_the_same_round(written):
    """What a busy round adds to both isn't counted as ours."""
    rounds = {"asgi.bare": [10.0, 50.0, 20.0], "asgi.ours": [12.0, 52.0, 22.0]}
    samples = {name: {"wall": times, "cpu": times} for name, times in rounds.items()}
    text = written(("latency", "asyncio asgi", {**LATENCY, "unused": samples}))

    assert "| 2.0 µs | ≤ 14.0 µs | met |" in row(text, "session obtained")
    assert "| 22.0 (+2.0) |" in row(text, "**asgi-dbscope** |")


def test_what_was_not_measured_is_not_met(written):
    """A target without a figure doesn't count as met."""
    text = written()

    assert row(text, "connection held during a body").endswith("| not measured |")


def test_who_says_yes_to_a_failed_commit_is_marked_everywhere(written):
    """A contestant that answers 200 to a COMMIT that fails has a mark in every table of it."""
    lie = {"status": 200, "error": None, "rows": 0}
    truth = {"status": 500, "error": None, "rows": 0}
    text = written(
        throughput(99.0),
        ("correctness", "asgi", {"asgi.by_hand": {"commit_fails": lie}}),
        ("correctness", "starlette", {"asgi.ours": {"commit_fails": truth}}),
    )

    assert "⚠" in row(text, "by hand")
    assert "⚠" not in row(text, "**asgi-dbscope**")
    assert "⚠ answers 200 to a request whose COMMIT fails." in text


def test_page_names_the_machine_and_the_versions(written):
    """The machine, and the versions that matter, are on the page."""
    text = written()

    assert "a processor, 2 cores, Linux" in text
    assert "| main | python 3.12.1, sqlalchemy 2.1.9 |" in text


def test_times_of_wrk_are_read_in_any_unit():
    """What wrk prints is read, whatever unit it chose."""
    told = """
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    46.17ms    8.30ms   1.05s    83.78%
  Latency Distribution
     50%  940.00us
     75%   47.85ms
     90%   60.07ms
     99%    1.01s
"""

    assert {"p50": 0.94, "p99": 1010.0, "max": 1050.0} == read(told)


def test_server_tells_how_long_a_connection_was_held(postgres_url):
    """G6: Behind a real server, no connection is held once the head has gone out."""
    with database(postgres_url) as url:
        bench = Bench(url, contestants(), is_quick=True)
        with bench.kept:
            server = bench.server(by_name("asgi.ours"))
            held = asyncio.run(late_holds(server, "background", 1))
            head, first = asyncio.run(first_byte(server))

    assert 0.0 == held
    assert 0.0 < head <= first
