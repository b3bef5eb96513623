"""What a request costs that uses one to four databases."""

from __future__ import annotations

from bench.contestants.databases import NUMBERS
from bench.pair import Pair

MEASURE = Pair(
    name="databases",
    title="Several databases",
    about="A request with a SELECT in each of so many databases, each with an engine of its own.",
    names=("asgi.databases-by_hand", "asgi.databases-ours"),
    columns=("by hand", "asgi-dbscope"),
    routes={str(number): str(number) for number in NUMBERS},
)
