"""Pytest plugin: time that is up when a test says so, and never before, on a busy machine neither.

A short `timeout` in a test is a wager: that BEGIN and what comes before the point are quicker.
"""

from time import monotonic
from typing import Any

import pytest

from asgi_dbscope import SessionScope, _doubt, _use, _watch

LONG = 300.0
"""Seconds, for a `timeout` or `idle_timeout` that does not end by itself."""


class Clock:
    """What the clocks of transactions go by: real time, and what a test has let pass besides.

    So does the asking after a COMMIT.
    """

    def __init__(self) -> None:
        self._passed = 0.0

    def __call__(self) -> float:
        return monotonic() + self._passed

    def forward(self, seconds: float, *scopes: SessionScope[Any]) -> None:
        """Let *seconds* pass; the timers of the transactions of *scopes* find that out."""
        self._passed += seconds
        for scope in scopes:
            watch: Any = scope.watch
            watch._look()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all transactions."""
    clock = Clock()
    for module in (_watch, _use, _doubt):
        monkeypatch.setattr(module, "monotonic", clock)
    return clock
