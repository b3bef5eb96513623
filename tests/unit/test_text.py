"""What comes from outside stands in logs, messages and SQL as one short line, without secrets."""

import functools
import traceback

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import ConfigurationError, Database, DBSessionMiddleware, pgbouncer_options
from asgi_dbscope._text import ascii_line, label_of, name_of, one_line, told
from tests.fix_asgi import http_scope

SECRET = "s3cr3t"
ANYTHING = st.text(st.characters(), max_size=300)
"""Any code point: controls, surrogates, directions."""


@given(ANYTHING)
def test_line_is_one_short_printable_line(text):
    """No line break, control character or direction of a client's gets into a log."""
    line = one_line(text)

    assert line.isprintable()
    assert 203 >= len(line)
    assert line == one_line(line) or len(line) == 203


@given(ANYTHING)
def test_line_for_sql_is_ascii_and_ends_no_comment(text):
    """Any connection's encoding has it, and a comment around it stays one."""
    line = ascii_line(text)

    assert line.isascii()
    assert line.isprintable()
    assert "*" not in line
    assert 2100 >= len(line)


@pytest.mark.parametrize(
    ("scope", "label"),
    [
        (http_scope("/orders/ä"), "GET /orders/ä"),
        (http_scope("/a\nERROR forged\x1b[2K\u202etxt"), r"GET /a\nERROR forged\x1b[2K\u202etxt"),
        (http_scope("/" + "x" * 65536), "GET /" + "x" * 195 + "..."),
        (http_scope(b"/bytes".decode(), method="GET\r\n"), r"GET\r\n /bytes"),
        ({"type": "http", "path": b"/a\n"}, r"? b'/a\n'"),
        ({"type": "http"}, "? ?"),
        ({"type": "websocket", "path": "/chat"}, "WEBSOCKET /chat"),
    ],
)
def test_label_of_a_request_is_escaped_and_cut(scope, label):
    """A path can't write log lines of its own, nor fill the log."""
    assert label == label_of(scope)


def send_mail(address: str) -> None:
    """A hook."""


class Caller:
    """A callable."""

    def __call__(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (send_mail, "send_mail"),
        (functools.partial(functools.partial(send_mail, SECRET)), "send_mail"),
        (Caller(), "Caller"),
    ],
)
def test_name_of_a_function_shows_no_arguments(function, name):
    """What a hook was given may be anybody's address."""
    assert name == name_of(function)


URLS = [
    f"postgresql+asyncpg://user:{SECRET}@/shop",
    f"postgresql+psycopg://user:p%40{SECRET}@/shop",
    f"postgresql+asyncpg:///shop?password={SECRET}&host=here",
    f"postgresql+psycopg:///shop?sslpassword={SECRET}&passwd={SECRET}&pwd={SECRET}",
]


@pytest.mark.parametrize("url", URLS)
def test_database_shows_no_password_of_its_url(url):
    """Neither the one before the host, nor what drivers take as one by the query."""
    parsed = sa.make_url(url)
    is_async = parsed.get_driver_name() == "asyncpg"
    engine = create_async_engine(parsed) if is_async else sa.create_engine(parsed)
    shown = [repr(Database(engine)), told(engine), told(parsed), told(url), told([url])]

    assert SECRET not in " ".join(shown)
    assert "/shop" in shown[0]
    assert "here" in shown[0] or "host" not in url


def test_what_is_no_secret_is_shown():
    """A message about a wrong argument shows it."""
    assert "None" == told(None)
    assert "5" == told(5)
    assert "a dict, not shown because it may hold a password" == told({"url": URLS[0]})


async def app(scope, receive, send):
    """Do nothing."""


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (Database, [{"url": URLS[0]}], {}),
        (DBSessionMiddleware, [URLS[0]], {}),
        (DBSessionMiddleware, [app], {"database": URLS[0]}),
        (DBSessionMiddleware, [app], {"databases": URLS[0]}),
        (DBSessionMiddleware, [app], {"databases": [URLS[0]]}),
        (DBSessionMiddleware, [app], {"database": sa.create_engine(URLS[1])}),
    ],
)
def test_url_in_the_wrong_place_is_not_shown(function, arguments, options):
    """Who mistakes one argument for the other reads no password in the log."""
    with pytest.raises(ConfigurationError) as caught:
        function(*arguments, **options)

    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+asyncpg://user:p@{SECRET}:w@host/name",
        f"postgresql+asyncpg://host:{SECRET}/name",
        f"no-url-at-all {SECRET}",
        f"no_dialect://user:{SECRET}@host/name",
        f"postgresql+no_driver://user:{SECRET}@host/name?password={SECRET}",
        f"sqlite://user:{SECRET}@/file.db?password={SECRET}",
    ],
)
def test_url_that_cannot_be_read_is_not_quoted(url):
    """A password that isn't quoted as it should be is cut in odd places; none of them is shown."""
    with pytest.raises(ConfigurationError) as caught:
        Database(url)
    with pytest.raises(ConfigurationError):
        pgbouncer_options(url.replace("asyncpg", "other"))
    error: BaseException | None = caught.value

    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


async def test_engine_from_a_url_hides_parameters(tmp_path):
    """What a statement was given is in none of its errors, and so in no log."""
    db = Database(f"sqlite+aiosqlite:///{tmp_path}/a.db")

    with pytest.raises(sa.exc.OperationalError) as caught:
        async with db.session_scope() as session:
            await session.execute(sa.text("INSERT INTO nowhere VALUES (:it)"), {"it": SECRET})
    await db.dispose()

    assert SECRET not in "".join(traceback.format_exception(caught.value)[-1:])
