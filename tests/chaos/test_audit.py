"""The ledger under faults, on a server and a PostgreSQL of its own: what the audit finds.

It takes a minute or two, so it has an environment of its own: `tox run -e chaos`.
"""

import asyncio
from pathlib import Path

import pytest

from bench.chaos.app import IN_DOUBT, OUTCOME
from bench.chaos.audit import Findings, judge
from bench.chaos.client import Answer
from bench.chaos.faults import MEANINGS
from bench.chaos.requests import KINDS, Asked
from bench.chaos.results import Results
from bench.chaos.runner import ROUNDS, Run

CONTESTANTS = {"ours": 2_000, "ours_all": 1_000}
"""Who runs, until there were how many faults and faulty requests."""

SEED = 4


@pytest.fixture(scope="module", params=list(CONTESTANTS))
def results(request, tmp_path_factory):
    """What a run came to."""
    name = request.param
    run = Run(
        name,
        seed=SEED,
        is_over=lambda results: (
            results.faulty >= CONTESTANTS[name] and results.rounds >= len(ROUNDS)
        ),
        logs=tmp_path_factory.mktemp("logs"),
        tell=lambda results, what: None,
    )
    return asyncio.run(run.run())


def test_there_were_faults_of_every_kind(results: Results):
    """The audit means something: each kind of request was sent, and most kinds of faults struck."""
    assert CONTESTANTS[results.contestant] <= results.faulty
    assert set(KINDS) == {kind for kind, count in results.kinds.items() if count}
    assert results.faults["terminated"]
    assert results.faults["cut before COMMIT"]
    assert results.faults["cut after COMMIT"]
    assert results.faults["restarted fast"] + results.faults["restarted immediate"]
    assert set(results.faults) <= set(MEANINGS)
    assert results.findings.statuses[201]


def test_nothing_that_was_acknowledged_is_missing(results: Results):
    """G1, G15: Every 2xx stands for a row, whatever happened to connection, server or client."""
    assert {} == dict(results.findings.missing)


def test_nothing_is_there_that_an_error_denied(results: Results):
    """G2, G3: Every error that doesn't say *in doubt* stands for a rollback."""
    assert {} == dict(results.findings.present)


def test_what_is_in_doubt_is_one_or_the_other(results: Results):
    """G15: A COMMIT that got no answer was done or not; asked, PostgreSQL mostly says which."""
    in_doubt = results.findings.in_doubt

    assert {"committed", "rolled back"} >= set(in_doubt)
    if results.contestant == "ours":  # which doesn't ask
        assert in_doubt.total()


def test_nothing_is_there_by_half(results: Results):
    """G7, G21: Transfers balance, bodies are whole or not there, and no read saw otherwise."""
    assert 0 == results.findings.halves.total(), results.findings.named
    assert 0 == results.wrong_sums


def test_nothing_is_left_over(results: Results):
    """G9, G19, G22: No connection, no transaction, no task; each server ends when it is told."""
    left = {name: count for name, count in results.left.items() if count}

    assert {} == left, results.named
    assert {} == {
        name: count for name, count in results.log.items() if count and name != "logged as in doubt"
    }


def test_every_request_ends(results: Results):
    """G10, G14: No client waits for ever."""
    assert 0 == results.findings.hung.total()


def test_what_comes_after_is_served(results: Results):
    """G19: After each storm the next hundred requests succeed."""
    assert 100 * results.rounds == results.next_tried
    assert 0 == results.next_failed, results.named


@pytest.mark.parametrize(
    ("answer", "is_present", "pages", "finding"),
    [
        (Answer(201, is_complete=True), True, 0, None),
        (Answer(201, is_complete=True), False, 0, "missing"),
        (Answer(200), False, 0, "missing"),
        (Answer(200, is_complete=True), True, 3, "missing"),
        (Answer(500, is_complete=True), True, 0, "present"),
        (Answer(409, is_complete=True), True, 0, "present"),
        (Answer(503, {OUTCOME: IN_DOUBT}), True, 0, None),
        (Answer(), True, 0, None),
        (Answer(200), True, 2, "halves"),
    ],
)
def test_the_audit_finds_what_is_wrong(answer, is_present, pages, finding):
    """A success without its row, an error with it, and a body of which half is there."""
    findings = Findings()
    judge(Asked(1, "statement", answer, pages=4 if pages else 0), is_present, pages, findings)

    found = {name for name in ("missing", "present", "halves") if getattr(findings, name)}
    assert (finding in found) if finding else not found


def test_the_audit_believes_the_log_of_a_doubt():
    """What a server answers by itself to a request that it cancels says nothing of the COMMIT."""
    findings = Findings()
    judge(
        Asked(1, "transfer", Answer(500)),
        is_present=True,
        pages=0,
        findings=findings,
        is_doubted=True,
    )

    assert {"committed": 1} == findings.in_doubt
    assert not findings.present


def test_page_explains_every_fault():
    """The documentation has a line for each kind of request and each kind of fault."""
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    meanings = {**{name: kind.means for name, kind in KINDS.items()}, **MEANINGS}

    assert [] == [name for name, means in meanings.items() if f"| *{name}* | {means} |" not in page]
