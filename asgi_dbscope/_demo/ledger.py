"""The ledger: accounts, transfers, statements, receipts. It knows a session, and nothing else."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, PositiveInt
from sqlalchemy import ForeignKey, func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncSession

OPENING_BALANCES = {"alice": 100, "bob": 100}

PAGE_SIZE = 64 * 1024
"""Bytes of a statement's page."""

SECONDS_PER_PAGE = 0.001
"""How long a page of a statement takes to lay out."""


class Base(DeclarativeBase):
    """The tables."""


class Account(Base):
    """Whom money belongs to."""

    __tablename__ = "account"
    name: Mapped[str] = mapped_column(primary_key=True)
    opening_balance: Mapped[int]


class Transfer(Base):
    """Money on its way: one entry that takes it, one that gives it."""

    __tablename__ = "transfer"
    id: Mapped[int] = mapped_column(primary_key=True)


class Entry(Base):
    """A line in an account. Whether the account exists is asked at COMMIT, and only then."""

    __tablename__ = "entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    transfer_id: Mapped[int] = mapped_column(ForeignKey(Transfer.id))
    account: Mapped[str] = mapped_column(
        ForeignKey(Account.name, deferrable=True, initially="DEFERRED")
    )
    amount: Mapped[int]


class Label(Base):
    """A word that transfers are filed under."""

    __tablename__ = "label"
    name: Mapped[str] = mapped_column(primary_key=True)


class Page(Base):
    """A page of a statement, and who got to read it."""

    __tablename__ = "page"
    id: Mapped[int] = mapped_column(primary_key=True)
    reader: Mapped[str] = mapped_column(
        ForeignKey(Account.name, deferrable=True, initially="DEFERRED")
    )
    number: Mapped[int]


class Receipt(Base):
    """What the recipient of a transfer was sent."""

    __tablename__ = "receipt"
    id: Mapped[int] = mapped_column(primary_key=True)
    transfer_id: Mapped[int] = mapped_column(ForeignKey(Transfer.id))


class Order(BaseModel):
    """What a client asks for."""

    sender: str
    recipient: str
    amount: PositiveInt
    label: str | None = None
    via: Literal["book", "bank"] = "book"
    receipt: Literal["mail", "fax"] | None = None


class OverdrawnError(Exception):
    """The sender has less than the transfer takes."""


async def balances(session: AsyncSession) -> dict[str, int]:
    """What each account has."""
    entries = func.coalesce(func.sum(Entry.amount), 0)
    found = await session.execute(
        select(Account.name, Account.opening_balance + entries)
        .outerjoin(Entry, Entry.account == Account.name)
        .group_by(Account.name, Account.opening_balance)
        .order_by(Account.name)
    )
    return {name: balance for name, balance in found}  # noqa: C416 - rows, which type checkers know


async def book(session: AsyncSession, order: Order) -> Transfer:
    """Write a transfer and its entries.

    Raises:
        OverdrawnError: If the sender has less than that; the entries are written by then.
    """
    transfer = Transfer()
    session.add(transfer)
    await session.flush()
    for account, amount in ((order.sender, -order.amount), (order.recipient, order.amount)):
        session.add(Entry(transfer_id=transfer.id, account=account, amount=amount))
    if (await balances(session)).get(order.sender, 0) < 0:
        raise OverdrawnError
    if order.label is not None:
        with suppress(IntegrityError):  # it is there already: fine, or so this app believes
            await session.execute(insert(Label).values(name=order.label))
    return transfer


async def tell_bank() -> None:
    """Tell the bank of a transfer; its gateway is down today."""
    raise ConnectionError


async def write_receipt(session: AsyncSession, transfer_id: int, way: str) -> None:
    """Write a receipt and send it; there is no fax any more."""
    session.add(Receipt(transfer_id=transfer_id))
    await session.flush()
    if way == "fax":
        raise ConnectionError


async def print_statement(
    session: AsyncSession, reader: str, currency: str, pages: int
) -> AsyncIterator[bytes]:
    """Yield a statement page by page; note of each page who read it."""
    rates = {"EUR": 1.0}
    for number in range(1, pages + 1):
        await asyncio.sleep(SECONDS_PER_PAGE)
        session.add(Page(reader=reader, number=number))
        await session.flush()
        yield f"page {number}\n".encode().ljust(PAGE_SIZE)
        rates[currency]  # the next page needs it


async def print_archive(pages: int) -> AsyncIterator[bytes]:
    """Yield what needs no database any more."""
    for number in range(1, pages + 1):
        yield f"archived page {number}\n".encode().ljust(PAGE_SIZE)
