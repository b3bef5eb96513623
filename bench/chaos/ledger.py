"""The ledger: what a request writes, so that the database alone can tell what became of it.

A transfer has the request's id, two entries, and moves two balances; a stream writes pages; work
after the response writes a receipt.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

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
    """Written after the response.

    It doesn't refer to its transfer either: the audit asks whether that is there.
    """

    __tablename__ = "receipt"
    id: Mapped[int] = mapped_column(primary_key=True)
    transfer_id: Mapped[int] = mapped_column(index=True)


class Label(Base):
    __tablename__ = "label"
    name: Mapped[str] = mapped_column(primary_key=True)


TAKE = text("UPDATE account SET balance = balance - :amount WHERE id = :id")
"""Changes a balance; its row stays locked to the end of the transaction."""

SUM = text("SELECT sum(balance) FROM account")
LABEL_AGAIN = text("INSERT INTO label (name) VALUES (:name)").bindparams(name=LABEL)
SLEEP = text("SELECT pg_sleep(0.05)")


def entries(transfer: int, sender: int, recipient: int) -> list[Entry]:
    """The entries of a transfer of 1."""
    return [
        Entry(transfer_id=transfer, account_id=sender, amount=-1),
        Entry(transfer_id=transfer, account_id=recipient, amount=1),
    ]
