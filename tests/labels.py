"""Labels that would like to be SQL, and statements that they might confuse."""

from typing import Any

import sqlalchemy as sa
from hypothesis import strategies as st

from tests.fix_database import Item

NASTY = (
    *("'", '"', "';", '\\"', "\\'", "\\", "`", "$$", "$1", "?", ":x", ":note", "%", "%%", "%s"),
    *("%(x)s", "*/", "/*", "/* /*", "*/*/", "**//", "*\\/", "--", "-- ", "\n", "\r\n", "\0"),
    *("\u2028", "\u202e", "\ud800", "\U0001f600", "ä", "{x}", "\x1b[2J"),
    *(
        "!50000 1",
        "M! 1",
        "*/ /*! DELETE FROM item */",
        "#",
        "*/; DELETE FROM item; /*",
        "\n; DELETE FROM item; --",
        "' || pg_sleep(9) || '",
    ),
)
LABELS = st.one_of(
    st.sampled_from(NASTY),
    st.lists(st.sampled_from(NASTY), min_size=1, max_size=9).map("".join),
    st.text(st.characters(), min_size=1),
    st.sampled_from(NASTY).map(lambda each: each * 65536),
)

STATEMENTS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (sa.select(sa.literal("a:x %s ? $1", sa.String)), {}),
    (sa.select(Item.id).where(Item.note == sa.bindparam("x")), {"x": "100%"}),
    (sa.select(Item.id).where(Item.note.like("1%")), {}),
    (sa.text("SELECT id FROM item WHERE note = :x -- to the end of the line"), {"x": "100%"}),
    (sa.text("SELECT id FROM item WHERE note = '100%' /* of a comment */"), {}),
)
"""Statements with something that a label might confuse, and their parameters."""
