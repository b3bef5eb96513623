"""The ledger under faults, on a server and a PostgreSQL of its own: what the audit finds.

It takes a minute or two, so it has an environment of its own: `tox run -e chaos`.
"""

import asyncio

import pytest

from bench.chaos import audit
from bench.chaos.app import IN_DOUBT, OUTCOME
from bench.chaos.audit import Findings, Known, judge, judge_receipt
from bench.chaos.client import Answer
from bench.chaos.faults import MEANINGS, STRIKES
from bench.chaos.logs import CROWD
from bench.chaos.page import BLOCKS, PAGE, marks
from bench.chaos.report import COLUMNS
from bench.chaos.requests import KINDS, Asked
from bench.chaos.results import Results
from bench.chaos.rows import ROWS
from bench.chaos.runner import ROUNDS, Run

CONTESTANTS = {"ours": 2_000, "ours_all": 1_000}
"""Who runs, until there were how many faults and faulty requests."""

SEED = 4

ENOUGH = {
    **{name: 5 for name, kind in KINDS.items() if kind.is_faulty},
    **dict.fromkeys(STRIKES, 3),
    "terminated": 10,
    "restarted fast": 1,
    "restarted immediate": 1,
    "SIGTERM": 2,
    "SIGKILL": 1,
    CROWD: 200,
    audit.WRITTEN: 20,
}
"""How often each of them has to strike before it means something."""

LONGEST = 9
"""Rounds until that counts as not happening."""


def lacking(results):
    """What hasn't struck often enough, and how often it has."""
    struck = results.faults + results.struck + results.findings.receipts
    return {name: struck[name] for name, enough in ENOUGH.items() if struck[name] < enough}


def is_over(results):
    """There were enough faults, and enough of each kind; chance and slow machines vary."""
    is_enough = results.faulty >= CONTESTANTS[results.contestant] and not lacking(results)
    return results.rounds >= (len(ROUNDS) if is_enough else LONGEST)


@pytest.fixture(scope="module", params=list(CONTESTANTS))
def results(request, tmp_path_factory):
    """What a run came to."""
    run = Run(
        request.param,
        seed=SEED,
        is_over=is_over,
        logs=tmp_path_factory.mktemp("logs"),
        tell=lambda results, what: None,
    )
    return asyncio.run(run.run())


def test_every_kind_of_fault_struck(results: Results):
    """The audit means something: each kind of fault and faulty request struck, and not just once.

    What the clients mean to do doesn't count, but what they saw, what the proxy did, and what the
    logs of PostgreSQL and the app say.
    """
    assert CONTESTANTS[results.contestant] <= results.faulty
    assert {} == lacking(results)
    assert set(KINDS) == set(results.kinds)
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
    named = results.findings.named.get(IN_DOUBT, [])
    assert in_doubt.total() <= len(named)
    assert {"committed", "rolled back"} >= {each["became"] for each in named}


def test_receipts_are_there_for_what_was_committed(results: Results):
    """G2, G8: Work after a response is kept once, never after a rollback, nor lost in silence."""
    assert 0 == results.findings.wrong_receipts, results.findings.named


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
    judge(
        Asked(1, "statement", answer, pages=4 if pages else 0), Known(is_present, pages), findings
    )

    found = {name for name in ("missing", "present", "halves") if getattr(findings, name)}
    assert (finding in found) if finding else not found


def test_the_audit_believes_the_log_of_a_doubt():
    """What a server answers by itself to a request that it cancels says nothing of the COMMIT."""
    findings = Findings()
    judge(Asked(1, "transfer", Answer(500)), Known(is_present=True, is_in_doubt=True), findings)

    assert {"committed": 1} == findings.in_doubt
    assert not findings.present


def test_the_audit_names_every_doubt():
    """However many are in doubt, the results name each, and say what became of it."""
    findings = Findings()
    for number in range(3 * audit.KEPT):
        asked = Asked(number, "transfer", Answer(503, {OUTCOME: IN_DOUBT}))
        judge(asked, Known(is_present=number % 2 == 0), findings)

    named = findings.named[IN_DOUBT]
    assert [*range(3 * audit.KEPT)] == [each["id"] for each in named]
    assert ["committed", "rolled back"] == [each["became"] for each in named[:2]]


DONE = Answer(201, is_complete=True)


@pytest.mark.parametrize(
    ("asked", "known", "became"),
    [
        (Asked(1, "receipt", DONE, has_receipt=True), Known(True, receipts=1), audit.WRITTEN),
        (Asked(1, "receipt", DONE, has_receipt=True), Known(True), audit.LOST_IN_SILENCE),
        (
            Asked(1, "receipt", DONE, has_receipt=True),
            Known(True, has_failed=True),
            audit.LOST_AND_LOGGED,
        ),
        (
            Asked(1, "receipt", DONE, has_receipt=True),
            Known(True, was_killed=True),
            audit.LOST_WITH_THE_PROCESS,
        ),
        (Asked(1, "receipt", DONE, has_receipt=True), Known(True, receipts=2), audit.WRITTEN_TWICE),
        (
            Asked(1, "commit refused", Answer(500), has_receipt=True),
            Known(False, receipts=1),
            audit.OF_NO_TRANSFER,
        ),
        (Asked(1, "commit refused", Answer(500), has_receipt=True), Known(False), None),
        (Asked(1, "receipt", Answer(), has_receipt=True), Known(True), None),
        (Asked(1, "transfer", DONE), Known(True), None),
    ],
)
def test_the_audit_asks_for_receipts(asked, known, became):
    """One for each acknowledged transfer that was to have it; a loss has to be in the log."""
    assert became == judge_receipt(asked, known)


def test_page_explains_every_fault():
    """The documentation has a line for each kind of request and each kind of fault."""
    page = PAGE.read_text()
    meanings = {**{name: kind.means for name, kind in KINDS.items()}, **MEANINGS}

    assert [] == [name for name, means in meanings.items() if f"| *{name}* | {means} |" not in page]


def test_page_has_a_row_for_everyone_and_the_command_it_was_run_by():
    """Its tables are as the command writes them; each row can be repeated alone."""
    page = PAGE.read_text()
    header, rows = f"| {' | '.join(COLUMNS)} |", [f"\n| {each.label} | " for each in ROWS]
    commands = [each.command(0, 1).split(" --minutes")[0] + " --minutes " for each in ROWS]

    assert header in page
    assert [] == [each for each in rows if each not in page]
    assert [] == [each for each in commands if each not in page]
    assert [] == [mark for name in BLOCKS for mark in marks(name) if page.count(mark) != 1]
