"""What a transactional block costs, beside the plain SQLAlchemy that it stands for."""

from __future__ import annotations

from bench.pair import Pair

MEASURE = Pair(
    name="blocks",
    title="Transactional blocks",
    about=(
        "One [transactional block](transactions.md#transactional-blocks) inside a transaction that "
        "is open on both sides; each is called as a request, whose own cost is in the first row. "
        "*Joined* by hand is no block at all: the next function just uses the session. `NESTED` by "
        "hand is `session.begin_nested()`, `REQUIRES_NEW` is `session_factory.begin()`."
    ),
    names=("asgi.blocks-by_hand", "asgi.blocks-ours"),
    columns=("by hand", "asgi-dbscope"),
    routes={
        "none": "no block",
        "joined": "joined, around nothing",
        "decorated": "joined, as a decorator",
        "read": "joined, around one SELECT",
        "nested": "`NESTED`, around one SELECT",
        "new": "`REQUIRES_NEW`, around one SELECT",
    },
)
