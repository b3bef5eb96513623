"""An object graph, as containers build one: a use case over two repositories, one session."""

import asyncio
from collections.abc import Awaitable, Callable

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session

from asgi_dbscope import current_scope, current_session
from tests.fix_database import Child, Item

AnySession = AsyncSession | async_scoped_session[AsyncSession]


class Items:
    """A repository."""

    def __init__(self, session: AsyncSession) -> None:
        self.session: AnySession = session

    def add(self, item_id: int) -> None:
        """Add an item."""
        self.session.add(Item(id=item_id))


class Children:
    """Another repository."""

    def __init__(self, session: AsyncSession) -> None:
        self.session: AnySession = session

    def add(self, child_id: int, *, of: int) -> None:
        """Add a child of an item; whether the item is there is asked at COMMIT."""
        self.session.add(Child(id=child_id, item_id=of))


class PlaceItem:
    """A use case: writes by one repository, then by the other."""

    def __init__(self, items: Items, children: Children) -> None:
        self.items = items
        self.children = children

    async def __call__(self, item_id: int, *, of: int | None = None) -> None:
        """Write an item and a child: its own, or one of item *of*."""
        self.items.add(item_id)
        await self.items.session.flush()
        self.children.add(item_id, of=item_id if of is None else of)
        await self.children.session.flush()

    async def count(self) -> int:
        """How many items there are."""
        return await self.items.session.scalar(sa.select(sa.func.count(Item.id))) or 0

    @property
    def sessions(self) -> set[AnySession]:
        """The sessions of the whole graph."""
        return {self.items.session, self.children.session}


Note = Callable[[PlaceItem], object]
"""Told each use case that a handler was given."""


async def serve(
    what: str, item_id: int, place: PlaceItem, note: Note, conflict: Exception
) -> Callable[[], Awaitable[None]] | None:
    """Answer a request, the last part of its path says how.

    Returns:
        What is left to do after the response.
    """
    note(place)
    if what == "later":

        async def place_later() -> None:
            await place(item_id)

        return place_later
    if what == "read":
        await place.count()
    else:
        await place(item_id, of=404 if what == "orphaned" else None)
    assert place.sessions == {current_session()}
    if what == "refused":
        raise conflict
    return None


def serve_in_thread(
    what: str, item_id: int, place: PlaceItem, note: Note, conflict: Exception
) -> None:
    """The same in a worker thread: what the session has to do, it does in the loop."""
    assert place.sessions == {current_session()}
    loop = current_scope().loop
    assert loop is not None
    serving = serve(what, item_id, place, note, conflict)
    asyncio.run_coroutine_threadsafe(serving, loop).result()


# --------------------------------------------------------------------------------------
# The same with synchronous sessions
# --------------------------------------------------------------------------------------


class SyncItems:
    """A repository."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def add(self, item_id: int) -> None:
        """Add an item."""
        self.session.add(Item(id=item_id))
        self.session.flush()


class SyncChildren:
    """Another repository."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def add(self, child_id: int, *, of: int) -> None:
        """Add a child of an item; whether the item is there is asked at COMMIT."""
        self.session.add(Child(id=child_id, item_id=of))
        self.session.flush()


class SyncPlaceItem:
    """A use case: writes by one repository, then by the other."""

    def __init__(self, items: SyncItems, children: SyncChildren) -> None:
        self.items = items
        self.children = children

    def __call__(self, item_id: int, *, of: int | None = None) -> None:
        """Write an item and a child: its own, or one of item *of*."""
        self.items.add(item_id)
        self.children.add(item_id, of=item_id if of is None else of)

    @property
    def sessions(self) -> set[Session]:
        """The sessions of the whole graph."""
        return {self.items.session, self.children.session}


def serve_synchronously(
    what: str,
    item_id: int,
    place: SyncPlaceItem,
    note: Callable[[SyncPlaceItem], object],
    conflict: Exception,
) -> Callable[[], None] | None:
    """Answer a request in a worker thread, the last part of its path says how.

    Returns:
        What is left to do after the response.
    """
    note(place)
    if what == "later":
        return lambda: place(item_id)
    place(item_id, of=404 if what == "orphaned" else None)
    assert {id(each) for each in place.sessions} == {id(current_session())}
    if what == "refused":
        raise conflict
    return None
