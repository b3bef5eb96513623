"""The ledger: what a request writes, so that the database alone can tell what became of it.

A transfer has the request's id, two entries, and moves two balances; a stream writes pages; work
after the response writes a receipt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import BigInteger, ForeignKey, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

ACCOUNTS = 2_000
OPENING_BALANCE = 1_000_000
LABEL = "rent"
"""A label that is there already."""


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    balance: Mapped[int] = mapped_column(BigInteger)


class Transfer(Base):
    __tablename__ = "transfer"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # the request's


class Entry(Base):
    """A line in an account. Whether the account exists is asked at COMMIT, and only then."""

    __tablename__ = "entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    transfer_id: Mapped[int] = mapped_column(ForeignKey(Transfer.id), index=True)
    account_id: Mapped[int] = mapped_column(
        ForeignKey(Account.id, deferrable=True, initially="DEFERRED")
    )
    amount: Mapped[int]


class Page(Base):
    """A page of a body, written while that goes out.

    It doesn't refer to its transfer: not everybody has committed that by then.
    """

    __tablename__ = "page"
    id: Mapped[int] = mapped_column(primary_key=True)
    transfer_id: Mapped[int] = mapped_column(index=True)


class Receipt(Base):
    """Written after the response."""

    __tablename__ = "receipt"
    id: Mapped[int] = mapped_column(primary_key=True)
    transfer_id: Mapped[int] = mapped_column(index=True)


class Label(Base):
    __tablename__ = "label"
    name: Mapped[str] = mapped_column(primary_key=True)


async def take(session: AsyncSession, account: int, amount: int) -> None:
    """Change a balance; its row stays locked to the end of the transaction."""
    await session.execute(
        text("UPDATE account SET balance = balance - :amount WHERE id = :id"),
        {"amount": amount, "id": account},
    )


async def book(session: AsyncSession, transfer: int, sender: int, recipient: int) -> None:
    """Write a transfer of 1 and its entries."""
    session.add(Transfer(id=transfer))
    await session.flush()
    session.add(Entry(transfer_id=transfer, account_id=sender, amount=-1))
    session.add(Entry(transfer_id=transfer, account_id=recipient, amount=1))
    await session.flush()
