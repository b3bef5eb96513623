"""Pytest plugin: where coverage is measured, nothing of it is lost on a busy machine."""

import sys

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Save what was measured while there is time: a worker that has finished is killed in ten
    seconds, and on a busy machine two of four had not saved theirs by then.
    """
    module = sys.modules.get("coverage")
    if module is not None and (coverage := module.Coverage.current()):
        coverage.save()
