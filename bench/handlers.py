"""How an endpoint comes by its session: opened by hand, asked for, awaited, or given."""
# The frameworks read the annotations of handlers, so they are no strings here.

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from bench.apps import BODIES, NAME, WRITES, Body, Framework, Handler, Handlers, Operations


async def none() -> Any:
    return NAME


def sync_none() -> Any:
    return NAME


def without(framework: Framework) -> Handlers:
    """The bare app: no session, the same answers."""

    def stream(body: Body) -> Handler:
        async def handle() -> Any:
            return framework.stream(body)

        return handle

    return {"none": none, "unused": none} | {route: stream(body) for route, body in BODIES.items()}


def sync_without() -> Handlers:
    return {"none": sync_none, "unused": sync_none}


def by_hand(factory: async_sessionmaker[AsyncSession], operations: Operations) -> Handlers:
    """As SQLAlchemy's documentation has it: a session for a block, committed by who writes."""

    def read(operation: Handler) -> Handler:
        async def handle() -> Any:
            async with factory() as session:
                return await operation(session)

        return handle

    def write(operation: Handler) -> Handler:
        async def handle() -> Any:
            async with factory() as session:
                answer = await operation(session)
                await session.commit()
                return answer

        return handle

    return {"none": none} | {
        route: (write if route in WRITES else read)(operation)
        for route, operation in operations.items()
    }


def asked(get: Callable[[], AsyncSession], operations: Operations) -> Handlers:
    """`get()` wherever the session is needed."""

    def handler(operation: Handler) -> Handler:
        async def handle() -> Any:
            return await operation(get())

        return handle

    return {"none": none} | {route: handler(each) for route, each in operations.items()}


def awaited(get: Callable[[], Awaitable[AsyncSession]], operations: Operations) -> Handlers:
    """`await get()` wherever the session is needed."""

    def handler(operation: Handler) -> Handler:
        async def handle() -> Any:
            return await operation(await get())

        return handle

    return {"none": none} | {route: handler(each) for route, each in operations.items()}


def from_request(
    request_type: Any, get: Callable[[Any], AsyncSession], operations: Operations
) -> Handlers:
    """`get(request)` wherever the session is needed."""

    def handler(operation: Handler) -> Handler:
        async def handle(request: Any) -> Any:
            return await operation(get(request))

        handle.__annotations__["request"] = request_type
        return handle

    return {"none": none} | {route: handler(each) for route, each in operations.items()}


def awaited_from_request(
    request_type: Any, get: Callable[[Any], Awaitable[AsyncSession]], operations: Operations
) -> Handlers:
    """`await get(request)` wherever the session is needed."""

    def handler(operation: Handler) -> Handler:
        async def handle(request: Any) -> Any:
            return await operation(await get(request))

        handle.__annotations__["request"] = request_type
        return handle

    return {"none": none} | {route: handler(each) for route, each in operations.items()}


def given(session_type: Any, operations: Operations) -> Handlers:
    """An argument of the handler: the annotation says where it comes from."""

    def handler(operation: Handler) -> Handler:
        async def handle(session: Any) -> Any:
            return await operation(session)

        handle.__annotations__["session"] = session_type
        return handle

    return {"none": none} | {route: handler(each) for route, each in operations.items()}


def sync_by_hand(factory: sessionmaker[Session], operations: Operations) -> Handlers:
    def handler(route: str, operation: Handler) -> Handler:
        def handle() -> Any:
            with factory() as session:
                answer = operation(session)
                if route in WRITES:
                    session.commit()
                return answer

        return handle

    return {"none": sync_none} | {
        route: handler(route, operation) for route, operation in operations.items()
    }


def sync_asked(get: Callable[[], Session], operations: Operations) -> Handlers:
    def handler(operation: Handler) -> Handler:
        def handle() -> Any:
            return operation(get())

        return handle

    return {"none": sync_none} | {route: handler(each) for route, each in operations.items()}


def sync_given(session_type: Any, operations: Operations) -> Handlers:
    def handler(operation: Handler) -> Handler:
        def handle(session: Any) -> Any:
            return operation(session)

        handle.__annotations__["session"] = session_type
        return handle

    return {"none": sync_none} | {route: handler(each) for route, each in operations.items()}
