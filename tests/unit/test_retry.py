"""The option `retry`, its delays, and which errors are conflicts."""

import sqlite3

import pytest
import sqlalchemy as sa

from asgi_dbscope import ConfigurationError, Retry
from asgi_dbscope._dialects import ends_transaction
from asgi_dbscope._driver_errors import find_conflict
from asgi_dbscope._retry import Attempt, EndpointRetries


class DriverError(Exception):
    """What asyncpg and psycopg raise, as far as it matters."""

    def __init__(self, sqlstate):
        super().__init__("as the server says")
        self.sqlstate = sqlstate


class OtherDriverError(Exception):
    """What psycopg2 raises, as far as it matters."""

    pgcode = "40001"


def mysql_error(package, *args):
    """What a driver of MySQL raises, as far as it matters."""
    cls = type("OperationalError", (Exception,), {"__module__": f"{package}.err"})
    return cls(*args)


def sqlite_error(code):
    """What `sqlite3` raises for *code*."""
    error = sqlite3.OperationalError("as SQLite says")
    error.sqlite_errorcode = code
    error.sqlite_errorname = {5: "SQLITE_BUSY", 517: "SQLITE_BUSY_SNAPSHOT"}.get(code, "?")
    return error


def wrapped(error):
    """*error* as SQLAlchemy hands it on."""
    return sa.exc.OperationalError("UPDATE", {}, error)


def caused_by(error):
    """An error whose cause is *error*."""
    try:
        raise LookupError from error
    except LookupError as caused:
        return caused


def while_handling(error):
    """An error that was raised while *error* was handled."""
    try:
        try:
            raise error
        except Exception:
            raise LookupError  # noqa: B904 - that is what it is about
    except LookupError as raised:
        return raised


def circle():
    """An error that is its own cause."""
    error = LookupError()
    error.__cause__ = error
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DriverError("40001"), "40001"),
        (DriverError("40P01"), "40P01"),
        (OtherDriverError(), "40001"),
        (DriverError("23505"), None),
        (DriverError(None), None),
        (wrapped(DriverError("40001")), "40001"),
        (caused_by(wrapped(DriverError("40P01"))), "40P01"),
        (while_handling(DriverError("40001")), None),
        (ExceptionGroup("of tasks", [LookupError(), wrapped(DriverError("40001"))]), "40001"),
        (ExceptionGroup("of tasks", [LookupError()]), None),
        (circle(), None),
        (sqlite_error(sqlite3.SQLITE_BUSY), "SQLITE_BUSY"),
        (sqlite_error(sqlite3.SQLITE_BUSY_SNAPSHOT), "SQLITE_BUSY_SNAPSHOT"),
        (sqlite_error(sqlite3.SQLITE_FULL), None),
        (sqlite3.OperationalError("of Python's own"), None),
        (mysql_error("asyncmy", 1213, "Deadlock found"), "1213"),
        (mysql_error("pymysql", 1205, "Lock wait timeout exceeded"), "1205"),
        (mysql_error("pymysql", 1020, "Record has changed since last read"), "1020"),
        (mysql_error("pymysql", 1062, "Duplicate entry"), None),
        (mysql_error("pymysql"), None),
        (OSError(1213, "no driver's"), None),
        (LookupError(), None),
    ],
)
def test_conflicts_are_told_from_other_errors(error, code):
    """G16: by SQLSTATE or the driver's own code, through wrappers, causes and groups."""
    assert code == find_conflict(error)


def test_classes_of_ones_own_are_conflicts_where_they_are_named():
    """G16: an error of a class that `also` names is known by its class."""
    assert "LookupError" == find_conflict(caused_by(LookupError()), (LookupError,))
    assert "KeyError" == find_conflict(KeyError(), (LookupError,))
    assert find_conflict(KeyError(), (ValueError,)) is None


@pytest.mark.parametrize(
    ("statement", "ends"),
    [
        ("COMMIT", True),
        (" commit and chain", True),
        ("end transaction", True),
        ("ABORT", True),
        ("PREPARE TRANSACTION 'x'", True),
        ("-- why\n/* and\nhow */ COMMIT", True),
        ("INSERT INTO item VALUES (1); COMMIT", True),
        ("ROLLBACK", True),
        ("ROLLBACK AND CHAIN", True),
        ("ROLLBACK TO one", False),
        ("ROLLBACK WORK TO SAVEPOINT one", False),
        ("PREPARE one AS SELECT 1", False),
        ("SELECT CASE WHEN true THEN 1 END", False),
        ("CREATE TEMPORARY TABLE one (id integer) ON COMMIT DROP", False),
        ("INSERT INTO commit VALUES ('x')", False),
        ("/* COMMIT", False),
        ("INSERT INTO item VALUES ('it''s; COMMIT')", False),
        ("DO $x$ BEGIN NULL; END $x$", False),
        ("DO $$ BEGIN NULL; END $$; COMMIT", True),
        ("RELEASE one", False),
    ],
)
def test_statements_that_end_a_transaction_are_known_by_their_text(statement, ends):
    """G16: what a statement in plain SQL commits would be done twice."""
    assert ends is ends_transaction(statement)


def test_delays_grow_up_to_the_cap_and_are_random():
    """G16: full jitter: anything from nothing to twice as much each time, but the cap at most."""
    retry = Retry(base=0.1, cap=0.5)

    for number, longest in ((1, 0.1), (2, 0.2), (3, 0.4), (4, 0.5), (5000, 0.5)):
        delays = [retry.delay_after(number) for _ in range(200)]

        assert 0 <= min(delays) < longest / 4
        assert longest * 3 / 4 < max(delays) <= longest


@pytest.mark.parametrize(("cap", "seconds"), [(0, 1), (0.2, 1), (1.0, 1), (1.2, 2), (30, 30)])
def test_client_is_asked_to_wait_for_whole_seconds(cap, seconds):
    """G16: Retry-After has no fractions, and isn't nothing."""
    assert seconds == Retry(cap=cap).retry_after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attempts": 0}, r"Retry\(attempts=...\) takes a whole number from 1 on; got 0"),
        ({"attempts": True}, "attempts"),
        ({"attempts": 2.5}, "attempts"),
        ({"max_body": -1}, r"Retry\(max_body=...\) takes a whole number from 0 on; got -1"),
        ({"base": -0.1}, r"Retry\(base=...\) takes a number of seconds, not below 0; got -0.1"),
        ({"cap": "1"}, "cap"),
        ({"cap": True}, "cap"),
        ({"max_elapsed": float("inf")}, "max_elapsed"),
        ({"also": "LookupError"}, r"Retry\(also=...\) takes classes of Exception; got 'L'"),
        ({"also": BaseException}, "also"),
        ({"also": 3}, "got 3"),
        ({"also": [LookupError, 3]}, "got 3"),
    ],
)
def test_wrong_values_are_refused(options, message):
    """G16: a value that can't be meant is an error where it is given."""
    with pytest.raises(ConfigurationError, match=message):
        Retry(**options)


def test_classes_may_be_given_in_any_way():
    """G16: one class, a list or a generator of them."""
    assert (KeyError,) == Retry(also=KeyError).classes
    assert (KeyError, ValueError) == Retry(also=[KeyError, ValueError]).classes
    assert (KeyError,) == Retry(also=(each for each in [KeyError])).classes


def test_attempt_knows_whether_it_is_the_last_one():
    """G16: because nobody asked for more, all are used up, or something forbids another."""
    first = Attempt(Retry(attempts=2, base=0))
    second = first.following()

    assert [1, 2] == [first.number, second.number]
    assert (False, 0) == (first.is_last, first.delay())
    assert (True, None) == (second.is_last, second.delay())
    assert (True, None) == (Attempt(None).is_last, Attempt(None).delay())

    inner = Attempt(Retry(), first)
    inner.forbid("one")
    inner.forbid("two")

    assert ("one", "one") == (inner.fence, first.fence)
    assert (True, True) == (inner.is_last, first.is_last)


def test_attempt_that_took_all_the_time_is_the_last_one():
    """G16: whoever asks after `max_elapsed` is told that nothing follows."""
    attempt = Attempt(Retry(max_elapsed=0))

    while not attempt.is_last:
        """The clock has a resolution."""

    assert (None, "max_elapsed is over") == (attempt.delay(), attempt.why_last)


def test_last_attempt_of_a_part_is_not_the_last_of_all():
    """G16: a call's last attempt is made again with the request that it is a part of."""
    request = Attempt(Retry(attempts=2))
    call = Attempt(Retry(attempts=1), request)

    assert (True, False) == (call.is_last, call.is_last_of_all)

    request = request.following()
    call = Attempt(Retry(attempts=1), request)

    assert (True, True) == (call.is_last, call.is_last_of_all)


def test_fence_is_that_of_all_attempts():
    """G16: what is left of an attempt that has lost forbids those that come after it."""
    first = Attempt(Retry(attempts=3))
    second = first.following()
    first.forbid("one")

    assert ("one", True) == (second.fence, second.is_last)


def test_endpoints_are_known_by_the_largest_body():
    """G16: bodies are kept as far as any endpoint may need; one without attempts needs none."""
    endpoints = EndpointRetries()
    endpoints.expect(Retry(attempts=1, max_body=1000))

    assert endpoints.max_body is None

    for max_body in (10, 30, 20):
        endpoints.expect(Retry(max_body=max_body))

    assert 30 == endpoints.max_body


def test_what_is_over_is_nobodys_attempt_any_more():
    """G16: a task that outlives a call is a part of the request's attempt, until that ends."""
    request = Attempt(Retry())
    call = Attempt(Retry(), request).following()

    assert call is call.alive

    call.finish()

    assert request is call.alive

    request.finish()

    assert call.alive is None
