"""The demo, as a person runs it: a process of its own, real servers, real databases."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
from io import StringIO

import httpx
import pytest
import sqlalchemy as sa
from rich.console import Console
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope.__main__ import main
from asgi_dbscope._demo.command import Demo
from asgi_dbscope._demo.ledger import Transfer
from asgi_dbscope._demo.steps import STEPS, Facts, judge
from asgi_dbscope._demo.store import DemoError, Store, open_stores
from asgi_dbscope._demo.table import Printer
from asgi_dbscope._demo.tour import Visit

TIMEOUT = 100
"""Seconds that a process may take, on a busy machine."""

GUARANTEES = {"G1", "G2", "G3", "G4", "G5", "G6", "G7", "G8", "G21"}


@pytest.fixture
def environment(tmp_path):
    """An environment where what the demo leaves is seen: its temporary directory is ours."""
    plain = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    return {**plain, "TMPDIR": str(tmp_path), "COLUMNS": "100"}


@pytest.fixture
def demo(environment):
    """Run `python -m asgi_dbscope demo` to its end."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "asgi_dbscope", "demo", *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env=environment,
        )

    return run


@pytest.fixture
def start(environment):
    """Start Python on some lines; whatever still runs at the end is killed."""
    started = []

    def popen(*lines):
        process = subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate()


def demo_of(steps, *, once, keep=False):
    """The lines that run the demo with some of its steps only."""
    return (
        "import sys",
        "from asgi_dbscope._demo.command import Demo",
        "from asgi_dbscope._demo.steps import STEPS, Step",
        f"sys.exit(Demo(None, 0, once={once}, keep={keep}, steps={steps}).run())",
    )


def summary(output):
    """Title, guarantees and the two verdicts, of each step."""
    rows = re.findall(r"^\| \d+ +\| (.*?) +\| (.*?) +\| (.*?) +\| (.*?) +\|$", output, re.MULTILINE)
    return {title: (guarantees.split(), ours, other) for title, guarantees, ours, other in rows}


def read_until(stream, text):
    """The lines up to the one with *text* in it."""
    lines: list[str] = []
    while not lines or text not in lines[-1]:
        lines.append(stream.readline())
        assert lines[-1], "".join(lines)
    return "".join(lines)


# ------------------------------------------------------------------------------ the tour


def test_every_guarantee_is_kept_on_sqlite(demo, tmp_path):
    """G1, G2, G3, G4, G5, G6, G7, G8, G21: the tour finds each of them kept on an SQLite file."""
    ran = demo("--once")

    steps = summary(ran.stdout)
    assert ("", 0) == (ran.stderr, ran.returncode), ran.stdout
    assert [step.title for step in STEPS] == list(steps)
    assert GUARANTEES == {each for guarantees, _, _ in steps.values() for each in guarantees}
    assert {"kept"} == {ours for _, ours, _ in steps.values()}
    assert "NOT KEPT" == steps["502 returned after rows were written"][2]
    assert ran.stdout.isascii()
    assert [] == list(tmp_path.iterdir())


@pytest.mark.once
async def test_every_guarantee_is_kept_on_postgresql(demo, postgres_url):
    """G1, G2, G3, G4, G5, G6, G7, G8, G21: the tour finds each of them kept on PostgreSQL, where
    the yield dependency takes an aborted transaction for committed, and drops its schemas.
    """
    ran = demo("--once", "--url", postgres_url)

    steps = summary(ran.stdout)
    assert ("", 0) == (ran.stderr, ran.returncode), ran.stdout
    assert [step.title for step in STEPS] == list(steps)
    assert {"kept"} == {ours for _, ours, _ in steps.values()}
    assert "NOT KEPT" == steps["An SQL error that the app swallowed"][2]
    assert [] == await schemas_of(postgres_url)


async def schemas_of(url):
    """The demo's schemas in a database."""
    engine = create_async_engine(url, poolclass=sa.NullPool)
    async with engine.connect() as connection:
        found = await connection.scalars(
            sa.text("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'asgi_dbscope_demo%'")
        )
        return sorted(found)


@pytest.mark.once
def test_broken_guarantee_is_an_exit_status(start, tmp_path):
    """A step that is not as promised is told, and makes the exit status 1; the files are kept."""
    step = "Step('G1', 'Never', '', ('GET', '/health', None), {'never true': lambda facts: False})"

    process = start(*demo_of(f"[{step}]", once=True, keep=True))
    output, errors = process.communicate(timeout=TIMEOUT)

    assert {"Never": (["G1"], "NOT KEPT", "NOT KEPT")} == summary(output)
    assert "NO   never true" in output
    assert ("", 1) == (errors, process.returncode)
    assert ["ledger.db", "ledger_yield.db"] == sorted(each.name for each in tmp_path.glob("*/*"))


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.title.replace(" ", "-"))
def test_no_step_is_kept_by_an_app_that_does_the_wrong_thing(step):
    """What each step claims is false of a request that was answered too early, with rows and
    connections left over.
    """
    wrong = Facts(
        status=299,
        is_complete="the body is torn" in step.claims,
        timeline=[
            *(("head 299", 0.0), ("checkout", 1.0), ("BEGIN", 2.0), ("COMMIT", 3.0)),
            ("last byte", 4.0),
        ],
        rows={"transfers": 7},
        held=1,
        left=1,
    )

    assert {False} == set(judge(step.claims, wrong).values())


def test_order_is_what_counts():
    """G1: the claims of a transfer tell a COMMIT after the head from one before it."""
    transfer = next(step for step in STEPS if step.title == "A transfer")

    def claim(*names):
        timeline = [(name, float(at)) for at, name in enumerate(names)]
        facts = Facts(201, True, timeline, {"transfers": 1, "entries": 2}, 0, 0)
        return judge(transfer.claims, facts)["COMMIT answered before the head"]

    assert claim("checkout", "BEGIN", "COMMIT", "checkin", "head 201", "last byte")
    assert not claim("checkout", "BEGIN", "head 201", "COMMIT", "checkin", "last byte")
    assert not claim("checkout", "BEGIN", "error in COMMIT", "checkin", "head 201", "last byte")


def test_exit_status_is_the_tour_s(monkeypatch, capsys):
    """G1: A tour on which every guarantee was kept ends with the status of a success."""
    monkeypatch.setenv("COLUMNS", "100")
    try:
        status = Demo(None, 0, once=True, keep=False, steps=STEPS[:1]).run()
    finally:
        logging.disable(logging.NOTSET)  # the demo shows errors instead of logging them

    ((title, (_, ours, _)),) = summary(capsys.readouterr().out).items()
    assert (0, STEPS[0].title, "kept") == (status, title, ours)


def test_terminal_gets_lines_and_colours():
    """In a terminal the table is drawn with lines and colours."""
    facts = Facts(200, False, [("head 200", 0.0)], {}, 0, 0)
    console = Console(file=(screen := StringIO()), force_terminal=True, width=100)

    Printer(["one", "other"], console).print_step(1, [Visit(STEPS[7], facts, {"so": True})] * 2)

    assert "\N{BOX DRAWINGS LIGHT ARC DOWN AND RIGHT}" in screen.getvalue()
    assert "\x1b[1;36mhead 200" in screen.getvalue()
    assert "body torn" in screen.getvalue()


# --------------------------------------------------------------------------- at service


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_serves_until_it_is_interrupted(start, tmp_path):
    """G1: after the tour the demo serves, prints what the database did when, and ends cleanly."""
    process = start(*demo_of("STEPS[:1]", once=False))
    told = read_until(process.stdout, "/archive")
    ours, other = re.findall(r"^  (http://\S+)  ", told, re.MULTILINE)
    for url in (ours, other):
        assert {"alice": 100, "bob": 100} == httpx.get(f"{url}/accounts", trust_env=False).json()
    printed = read_until(process.stdout, "yield dependency: GET /accounts")

    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT)

    assert re.search(r"asgi_dbscope: GET /accounts .* COMMIT -.* checkin -.* head 200 \+0", printed)
    assert ("", 0) == (errors, process.returncode)
    assert [] == list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.once
def test_tour_can_be_terminated(start, tmp_path):
    """A signal in mid-tour ends the demo cleanly, with the exit status of an interruption."""
    process = start(*demo_of("STEPS * 9", once=True))
    read_until(process.stdout, "2. A transfer")

    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=TIMEOUT)

    assert ("", 130) == (errors, process.returncode)
    assert [] == list(tmp_path.iterdir())


# ------------------------------------------------------------------------- what goes wrong


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command where it ends before it serves: in this process, which is quicker."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["asgi_dbscope", "demo", *arguments])
        status = main()
        return status, *capsys.readouterr()

    return run


def test_port_in_use_is_one_line(command):
    """A port that is taken is named in one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        status, output, errors = command("--port", str(port))

    (line,) = errors.splitlines()
    assert line.startswith(f"Port {port} on 127.0.0.1 can't be had (Address already in use)")
    assert ("", 2) == (output, status)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "postgresql://somebody:secret@127.0.0.1:1/ledger",
            "The database postgresql+asyncpg://somebody:***@127.0.0.1:1/ledger can't be used: ",
        ),
        ("ledger", "The URL can't be read; it looks like "),
        ("postgresql://localhost:port/ledger", "The URL can't be read; it looks like "),
        (
            "mysql+aiomysql://localhost/ledger",
            "--url takes postgresql+asyncpg or postgresql+psycop",
        ),
        (
            "sqlite:///ledger.db",
            "--url takes postgresql+asyncpg or postgresql+psycopg, not sqlite;",
        ),
    ],
    ids=["unreachable", "no-url", "wrong-port", "mysql", "sqlite"],
)
def test_database_that_cannot_be_used_is_one_line(command, url, message):
    """A database that can't be reached, or a URL that can't be used, is told in one line, without
    its password.
    """
    status, output, errors = command("--once", "--url", url)

    assert ("", 2) == (output, status)
    assert errors.startswith(message)
    assert 1 == len(errors.splitlines())


def test_wrong_port_is_told(monkeypatch, capsys):
    """A port that is none is an error of the command line."""
    monkeypatch.setattr("sys.argv", ["asgi_dbscope", "demo", "--port", "65535"])

    with pytest.raises(SystemExit, match="2"):
        main()

    assert "65535 is not between 0 and 65534" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments", "package"),
    [
        ("aiosqlite", (), "asgi-dbscope[demo]"),
        ("asyncpg", ("--url", "postgresql://localhost/ledger"), "asgi-dbscope[postgresql]"),
    ],
)
def test_missing_driver_is_one_line(monkeypatch, command, module, arguments, package):
    """A driver that is not installed is named in one line, and what to install for it."""
    monkeypatch.setitem(sys.modules, module, None)

    status, output, errors = command("--once", *arguments)

    assert f"The demo needs {module}, which is not installed: pip install '{package}'\n" == errors
    assert ("", 2) == (output, status)


# ------------------------------------------------------------------------------ the store


async def test_leaked_connection_does_not_stop_the_tour(tmp_path):
    """A connection that an app leaves in a transaction is thrown away before the next step."""
    async with open_stores(None, tmp_path, keep=True) as (store, _):
        leaked = await store.engine.connect()
        await leaked.execute(sa.insert(Transfer))
        assert 1 == store.held()

        await store.reset()

        assert 0 == store.held()
        assert 0 == (await store.rows())["transfers"]
    assert ["ledger.db", "ledger_yield.db"] == sorted(each.name for each in tmp_path.iterdir())


@pytest.mark.parametrize("driver", ["postgresql", "postgresql+psycopg"])
async def test_schemas_are_dropped_at_the_end(postgres_url, tmp_path, driver):
    """On PostgreSQL each ledger is in a schema of its own, which is gone afterwards."""
    url = sa.make_url(postgres_url).set(drivername=driver).render_as_string(hide_password=False)

    async with open_stores(url, tmp_path, keep=False) as stores:
        for store in stores:
            await store.reset()
        assert sorted(str(store.schema) for store in stores) == await schemas_of(postgres_url)

    assert [] == await schemas_of(postgres_url)


async def test_schema_that_cannot_be_dropped_is_told(postgres_url):
    """A schema that is left behind is named."""
    store = Store(sa.make_url(postgres_url), "asgi_dbscope_demo_gone")

    with pytest.raises(DemoError, match="asgi_dbscope_demo_gone can't be dropped"):
        await store.close(keep=False)
