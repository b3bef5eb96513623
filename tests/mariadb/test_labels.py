"""Labels in comments on MariaDB, which has comments that it executes."""

import pytest
import sqlalchemy as sa

from asgi_dbscope import Database
from tests.fix_database import Item
from tests.labels import NASTY, STATEMENTS

INSERTS = sa.text("SHOW SESSION STATUS LIKE 'Com_insert'")

pytestmark = pytest.mark.parametrize("engine", ["asyncmy"], indirect=True)


async def test_many_rows_stay_one_statement(engine):
    """The driver sends the rows of a bulk INSERT at once, with a label as without."""
    counts = []
    for label in (None, "comment"):
        db = Database(engine, label_transactions=label)
        async with db.transactional(label="import VALUES (%s) 100%") as session:
            rows = [{"id": number, "note": "x"} for number in range(3)]
            for statement in (sa.insert(Item), sa.insert(Item).prefix_with("IGNORE")):
                before = (await session.execute(INSERTS)).one().Value
                await session.execute(statement, rows)
                counts.append(int((await session.execute(INSERTS)).one().Value) - int(before))
            await session.rollback()

    assert [1] * 4 == counts


async def test_statement_does_what_it_does_without_a_label(engine):
    """Nothing of a label is SQL, a parameter, or a comment of the kind `/*! ... */`."""
    db = Database(engine, label_transactions="comment")

    for label in (*NASTY, "".join(NASTY)):
        async with db.transactional(label=label) as session:
            rows = [{"id": number, "note": note} for number, note in ((1, "100%"), (2, "2"))]
            await session.execute(sa.insert(Item), rows)
            found = [list(await session.scalars(*each)) for each in STATEMENTS]
            await session.rollback()

        assert [["a:x %s ? $1"], [1], [1], [1], [1]] == found
