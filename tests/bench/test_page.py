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


def raced(*processes: tuple[list[float], list[float]]) -> list[Any]:
    """Of each process what ours took, and its control."""
    return [
        {kind: [list(own), list(control)] for kind in ("wall", "cpu", "rate")}
        for own, control in processes
    ]


def throughput(*ours: float) -> tuple[str, str, Any]:
    """By hand 100 microseconds of the server, and ours: each of a server of its own."""
    return (
        "throughput",
        "asgi",
        {
            "asgi.by_hand": {"select": raced(([100.0], [100.0]))},
            "asgi.ours": {"select": raced(*(([each], [100.0]) for each in ours))},
        },
    )


LATENCY = {
    route: {name: raced(([1.0], [1.0])) for name in ("asgi.by_hand", "asgi.ours")}
    for route in ("none", "unused", "select", "insert")
}


@pytest.mark.parametrize(
    ("ours", "figure", "verdict"),
    [
        ((97.0, 98.0, 99.0), "0.980 (0.970 to 0.990)", "met"),
        ((101.0, 102.0, 103.0), "1.020 (1.010 to 1.030)", "**not met**"),
        ((99.0, 98.0, 101.0), "0.990 (0.980 to 1.010)", "within the noise of the target"),
    ],
)
def test_verdict_is_given_where_all_processes_are_on_one_side(written, ours, figure, verdict):
    """A target is met or missed where no process says otherwise; the figures are beside it."""
    text = written(throughput(*ours))

    found = row(text, "one SELECT behind uvicorn")
    assert f"| 1.000 |  | {figure} | ≤ 1.000 | {verdict} |" in found


def test_instructions_are_judged_by_how_well_they_repeat(written):
    """A count that is missed by less than another count would differ by isn't told to be missed."""
    counts = {"asgi.by_hand": {"select": 1000.0}, "asgi.ours": {"select": 975.0}}
    text = written(("instructions", "asgi", counts))

    found = row(text, "one SELECT, instructions")
    assert "| 0.975 (0.965 to 0.985) | ≤ 0.970 | within the noise of the target |" in found


def test_microseconds_above_the_bare_app_are_of_the_same_round(written):
    """What a busy round adds to both isn't counted as ours."""
    unused = {
        "asgi.bare": raced(([10.0, 50.0, 20.0], [10.0, 51.0, 19.0])),
        "asgi.ours": raced(([12.0, 52.5, 22.0], [10.0, 50.0, 20.0])),
    }
    text = written(("latency", "asyncio asgi", {**LATENCY, "unused": unused}))

    assert "| 2.0 µs (2.0 µs to 2.5 µs) | ≤ 14.0 µs | met |" in row(text, "session obtained")
    assert "| 22.00 (+2.00: +2.00 to +2.50) |" in row(text, "**asgi-dbscope** |")
    assert "| 20.00 (+0.00: -1.00 to +1.00) |" in row(text, "the bare app |")


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
