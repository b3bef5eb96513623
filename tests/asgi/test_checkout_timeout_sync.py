"""`checkout_timeout` of a synchronous database: threads wait for a place no longer than that."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import pytest
import sqlalchemy as sa

from asgi_dbscope import Database, PoolExhaustedError
from tests.fix_sync import SYNC_DRIVERS


@pytest.mark.parametrize("driver", SYNC_DRIVERS)
def test_exhausted_pool_is_a_quick_error_that_names_the_holders(driver, make_sync_engine):
    """G14: a thread that gets no connection in time is told who holds them."""
    engine = make_sync_engine(driver, pool_size=1, max_overflow=0)
    db = Database(engine, checkout_timeout=0.05)
    is_held, may_go = threading.Event(), threading.Event()

    @db.transactional(label="report()")
    def hold():
        db.session.execute(sa.text("SELECT 1"))
        is_held.set()
        assert may_go.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert is_held.wait(10)
    with (
        pytest.raises(PoolExhaustedError, match=r"1 are taken: report\(\) for \d") as raised,
        db.session_scope() as session,
    ):
        session.execute(sa.text("SELECT 1"))
    may_go.set()
    holder.join()
    with db.session_scope() as session:
        assert 1 == session.scalar(sa.text("SELECT 1"))

    assert isinstance(raised.value.__cause__, sa.exc.TimeoutError)
    assert any("no transaction was begun" in each for each in raised.value.__notes__)


def test_pool_that_is_less_patient_stays_so(make_sync_engine):
    """G14: a longer `checkout_timeout` doesn't lengthen the pool's own, whose error comes then."""
    engine = make_sync_engine("sqlite", pool_size=1, max_overflow=0, pool_timeout=0.05)
    db = Database(engine, checkout_timeout=30)
    begun = monotonic()
    with (
        engine.connect(),
        pytest.raises(sa.exc.TimeoutError) as raised,
        db.session_scope() as session,
    ):
        session.execute(sa.text("SELECT 1"))

    assert monotonic() - begun < 10
    assert any("pool_size=1), and 1 are taken" in each for each in raised.value.__notes__)


@pytest.mark.parametrize("driver", SYNC_DRIVERS)
def test_no_place_is_lost_or_given_twice(driver, make_sync_engine):
    """G14: many threads that wait and give up leave the pool whole; it never gives out more."""
    engine = make_sync_engine(driver, pool_size=1, max_overflow=1, pool_timeout=30)
    db = Database(engine, checkout_timeout=0.02)
    got, refused = [], []
    most = 0

    def work(seed):
        nonlocal most
        pause = threading.Event()
        try:
            with db.session_scope() as session:
                session.execute(sa.text("SELECT 1"))
                most = max(most, engine.pool.checkedout())
                pause.wait(random.Random(seed).random() / 50)
            got.append(seed)
        except PoolExhaustedError:
            refused.append(seed)

    with engine.connect(), engine.connect(), ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(work, range(100)))

    assert set(range(100)) == set(got) | set(refused)
    assert got
    assert set(range(8)) <= set(refused)
    assert 2 == most
    assert 0 == engine.pool.checkedout()
    with engine.connect(), engine.connect():
        assert 2 == engine.pool.checkedout()


def test_nobody_elses_engine_is_changed(make_sync_engine):
    """G14: who uses the engine by itself waits as long as the engine says."""
    engine = make_sync_engine("sqlite", pool_size=1, max_overflow=0, pool_timeout=0.1)
    db = Database(engine, checkout_timeout=5)
    with db.session_scope() as session:
        session.execute(sa.text("SELECT 1"))
        with pytest.raises(sa.exc.TimeoutError, match=r"timeout 0\.10"):
            engine.connect()


def test_pool_without_places_has_no_wait(tmp_path):
    """G14: a `NullPool` connects each time, so there is nothing to wait for."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/null.db", poolclass=sa.NullPool)
    db = Database(engine, checkout_timeout=0.05)
    with db.session_scope() as session, engine.connect():
        assert 1 == session.scalar(sa.text("SELECT 1"))
