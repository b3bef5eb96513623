"""The measures: one file each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.measure import Measure

NAMES = (
    "correctness",
    "latency",
    "reads",
    "instructions",
    "allocations",
    "growth",
    "concurrency",
    "databases",
    "blocks",
    "in_doubt",
    "throughput",
    "hold",
    "first_byte",
    "pool_tail",
    "open_connections",
    "scale",
)
"""The files, in the order of the page."""


def measures() -> list[Measure]:
    """All of them."""
    return [import_module(f"{__name__}.{name}").MEASURE for name in NAMES]
