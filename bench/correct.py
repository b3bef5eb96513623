"""Who is fast because it says yes before it knows: what the measure of correctness found."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.results import Results

LIE = "⚠"
"""The mark of a contestant that answers 200 to a request whose COMMIT fails."""


def liars(results: Results) -> set[str]:
    """The names of those who have it."""
    return {
        name
        for contestants in results.found("correctness").values()
        for name, found in contestants.items()
        if found["commit_fails"]["status"] == HTTPStatus.OK
    }
