"""FastAPI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from bench.frameworks.starlette import background, server_error, stream

if TYPE_CHECKING:
    from bench.apps import Handlers

__all__ = ["app", "background", "server_error", "stream"]


def app(handlers: Handlers, **options: Any) -> FastAPI:
    made = FastAPI(**options)
    for route, handler in handlers.items():
        made.get(f"/{route}")(handler)
    return made
