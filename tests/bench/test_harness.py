"""Contestants answer, measures measure, and a run that was interrupted goes on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import environments
from bench.apps import Setup
from bench.contestants import by_name, contestants
from bench.database import database
from bench.measure import Bench, Unit
from bench.measures.correctness import PROBES, count, is_wrong
from bench.measures.growth import grown
from bench.measures.latency import ROUTES, takes_part
from bench.race import Raced, above, batch, race, ratio
from bench.results import Results
from bench.served import Served
from bench.worker import WorkerFailedError

HERE = [each for each in contestants() if each.environment == "main"]
"""Those whose packages the tests have, too."""

REQUESTS = ("none", "unused", "select", "insert")
BLOCKS = ("joined", "nested", "new")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def url(postgres_url):
    """A database with the tables."""
    with database(postgres_url) as url:
        yield url


async def dispose(served: Served) -> None:
    """Close its connections, of either kind."""
    if (disposing := served.engine.dispose()) is not None:
        await disposing


@pytest.mark.parametrize("contestant", HERE, ids=lambda each: each.name)
async def test_every_contestant_answers_every_route(contestant, url):
    """What is measured is the same answer of everyone."""
    served = Served(contestant.make(Setup(url)))
    routes = [route for route in ROUTES if takes_part(contestant, route)]
    async with served.lifespan():
        answers = [await served.ask(route) for route in routes]
    await dispose(served)

    assert [(200, None)] * len(routes) == [(each.status, each.error) for each in answers]
    assert all(b"item" in each.body for each in answers)


@pytest.mark.parametrize("way", ["ours", "by_hand"])
async def test_correctness_tells_who_lies(way, url):
    """G1, G2, G3, G21: Ours is right in every probe; by hand an aborted transaction is missed."""
    served = Served(by_name(f"starlette.{way}").make(Setup(url)))
    found = {}
    async with served.lifespan():
        for route, row in PROBES.items():
            before = count(url, row)
            answer = await served.ask(route)
            found[route] = {"status": answer.status, "rows": count(url, row) - before}
    await dispose(served)

    wrong = [route for route, each in found.items() if is_wrong(route, each)]
    assert (["swallow"] if way == "by_hand" else []) == wrong


def test_request_and_block_leave_nothing_to_the_cycle_collector(url):
    """G9: Reference counts free all of a request and of a block, whatever it did."""
    bench = Bench(url, [])
    found = {}
    for name, routes in (("asgi.ours", REQUESTS), ("asgi.blocks-ours", BLOCKS)):
        with bench.worker(by_name(name)) as worker:
            for route in routes:
                found[route] = worker.call(grown, route, 40)["cyclic"]

    assert dict.fromkeys(found, 0.0) == found


@pytest.mark.parametrize(("way", "route"), [("bare", "none"), ("by_hand", "select")])
async def test_the_same_beside_itself_is_no_difference(way, route, url):
    """What is measured of the same code twice is 0 microseconds and 1.00, within its interval."""
    served = Served(by_name(f"asgi.{way}").make(Setup(url)))
    served.beside = {"again": served}  # another one has its objects elsewhere in memory
    raced = [await race(served, "again", route, 5, 0.001, seed) for seed in range(5)]
    await dispose(served)

    more, times = above(raced, "cpu"), ratio(raced, "cpu")
    assert more.low <= 0.0 <= more.high
    assert times.low <= 1.0 <= times.high


def test_contestant_and_control_are_in_one_process(url):
    """Each is an app of its own, and each round has a turn of both: a session is ours alone."""
    ours, bare = by_name("asgi.ours"), by_name("asgi.bare")
    with Bench(url, []).worker(ours, beside=[bare, ours], start=1) as worker:
        raced: Raced = worker.call(race, bare.name, "unused", 3, 0.001, 1)

    assert {"wall": [3, 3], "cpu": [3, 3]} == {
        kind: [len(each) for each in samples] for kind, samples in raced.items()
    }
    own, control = raced["cpu"]
    assert min(own) > 2 * min(control)


def test_environment_of_other_versions_is_not_there(monkeypatch, tmp_path):
    """It is made anew where a contestant's pin, or a version of the runner's, has changed."""
    monkeypatch.setattr(environments, "HOME", tmp_path)
    note = tmp_path / "peers" / environments.NOTE
    found = [environments.is_there("peers")]
    note.parent.mkdir()
    for text in (environments.made_of("peers"), "sqlalchemy==1.4"):
        note.write_text(text)
        found.append(environments.is_there("peers"))

    assert [False, True, False] == found


def test_benchmarks_import_nothing_of_the_tests():
    """What both need is in `bench`: it runs where there are no tests."""
    files = [*ROOT.glob("bench/*.py"), *ROOT.glob("bench/[a-z]*/**/*.py")]

    assert [] == [
        each.name
        for each in files
        if re.search(r"^\s*(from|import) tests\b", each.read_text(), re.MULTILINE)
    ]


def test_worker_that_fails_says_why(url):
    """What a contestant's process raises is told, with the contestant's name."""
    with (
        pytest.raises(WorkerFailedError, match=r"asgi\.bare.*\n(.*\n)*KeyError: 'select'"),
        Bench(url, []).worker(by_name("asgi.bare")) as worker,
    ):
        worker.call(batch, "select", 1)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command; without a `PATH`, so that it finds neither `wrk` nor `valgrind` nor `uv`."""
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        check=False,
        cwd=ROOT,
        env={"PATH": ""},
        capture_output=True,
        text=True,
    )


def test_changed_package_is_measured_again(tmp_path):
    """What was measured of another source is dropped, and told by its name with the reason."""
    unit = Unit("asgi", ["asgi.ours"], 1.0, lambda *_: None)
    Results(tmp_path / "results.json", {}, "before").put("latency", unit, {})
    found = {
        source: Results(tmp_path / "results.json", {}, source) for source in ("before", "after")
    }

    assert [True, False] == [each.has("latency", unit) for each in found.values()]
    assert [{"asgi": {}}, {}] == [each.found("latency") for each in found.values()]
    assert [] == found["before"].dropped
    assert ["latency/asgi, measured of the package as before, which is after now"] == found[
        "after"
    ].dropped


def test_results_of_other_versions_are_dropped_and_told(tmp_path):
    """A page has one machine and one set of versions; what differs is named."""
    unit = Unit("asgi", ["asgi.ours"], 1.0, lambda *_: None)
    before, after = ({"versions": {"main": {"greenlet": each}}} for each in ("3.4", "3.5"))
    Results(tmp_path / "results.json", before, "source").put("latency", unit, {})
    results = Results(tmp_path / "results.json", after, "source")

    assert {} == results.found("latency")
    assert ["all 1 that were measured with versions main greenlet 3.4, now 3.5"] == results.dropped


def test_lists_of_numbers_have_a_line_each(tmp_path):
    """The file of results can be read, and what changed in it."""
    unit = Unit("asgi", ["asgi.ours"], 1.0, lambda *_: None)
    found = {"times": [1.5, -2e-05, 3], "names": ["a", "b"], "none": []}
    Results(tmp_path / "results.json", {}).put("latency", unit, found)

    assert '"times": [1.5,-2e-05,3],\n' in (tmp_path / "results.json").read_text()
    assert {"asgi": found} == Results(tmp_path / "results.json", None).found("latency")


def test_what_nothing_is_called_is_an_error(tmp_path):
    """A pattern that nothing matches writes no page."""
    told = run("--no-install", "--page", tmp_path / "page.md", "--only", "latancy")

    assert 2 == told.returncode
    assert "nothing is called ['latancy']" in told.stderr
    assert not (tmp_path / "page.md").exists()


def test_list_needs_no_database():
    """Saying what there is to run starts nothing and installs nothing."""
    told = run("--list", "--database", "postgresql://nowhere/", "--only", "scale")

    assert told.stdout.startswith("scale/select\t")


def test_run_is_written_down_and_goes_on(url, tmp_path):
    """A unit that is done isn't run again; the page is made of what was found."""
    files = ("--results", tmp_path / "results.json", "--page", tmp_path / "page.md")
    only = ("--quick", "--no-install", "--database", url, "--only", "in_doubt")
    codes = [run(*files, *only).returncode, run(*files, "--page-only").returncode]
    told = run(*files, *only, "--list")

    assert [0, 0] == codes
    assert "in_doubt/asyncio\tdone\n" == told.stdout
    written = json.loads((tmp_path / "results.json").read_text())
    assert ["in_doubt"] == list(written["measures"])
    assert "| one INSERT, committed |" in (tmp_path / "page.md").read_text()
