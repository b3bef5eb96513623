"""Pytest plugin: endpoints whose retries are forgotten after the test."""

import pytest

from asgi_dbscope._retry import endpoint_retries


@pytest.fixture
def forget_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process not know of retries that this test's endpoints have."""
    monkeypatch.setattr(endpoint_retries, "max_body", None)
