"""What `Database(resolve_in_doubt=True)` costs a request, beside the same without it."""

from __future__ import annotations

from bench.measures.latency import ROUTES
from bench.pair import Pair

MEASURE = Pair(
    name="in_doubt",
    title="In doubt",
    about=(
        "What [`Database(resolve_in_doubt=True)`](in-doubt.md#let-postgresql-say-what-became-of-it)"
        " adds: one short statement for a transaction that has written, a round trip to the server."
    ),
    names=("asgi.ours", "asgi.in_doubt"),
    columns=("without", "with it"),
    routes={route: ROUTES[route] for route in ("none", "select", "insert")},
)
