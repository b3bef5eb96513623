"""The contestants: one file for each way to get a session, as its own documentation has it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.contestant import Contestant

WAYS = (
    "bare",
    "by_hand",
    "ours",
    "depends",
    "base_http_middleware",
    "context_async_sqlalchemy",
    "fastapi_async_sqlalchemy",
    "asgi_sqlalchemy",
    "fastapi_sqla",
    "advanced_alchemy",
    "dishka",
)
"""The files, in the order of the tables."""

ASIDE = ("ours_reads", "blocks", "databases", "in_doubt")
"""Files of contestants that one measure alone asks for, by their names."""


def contestants() -> list[Contestant]:
    """All of them."""
    return _of(WAYS)


def _of(ways: Sequence[str]) -> list[Contestant]:
    modules = (import_module(f"{__name__}.{way}") for way in ways)
    return [each for module in modules for each in module.CONTESTANTS]


def by_name(name: str) -> Contestant:
    """The one that is called so."""
    return next(each for each in _of((*WAYS, *ASIDE)) if each.name == name)
