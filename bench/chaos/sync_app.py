"""The ledger's HTTP side once more, for those whose sessions and endpoints are synchronous."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from bench.chaos import ledger
from bench.chaos.app import Contestant, Order, refuse_or_fail


def add_endpoints(contestant: Contestant) -> None:
    """Add what a contestant's app has."""
    session_type = Annotated[Session, Depends(contestant.get_session)]

    @contestant.app.post("/transfers/{number}", status_code=201)
    def transfer(order: Order, session: session_type, tasks: BackgroundTasks) -> Any:
        if order.is_serializable:
            session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        move(order, session)
        if order.has_receipt:
            tasks.add_task(write_receipt, session, order.id)
        finish(order, session)
        return {"transfer": order.id}

    @contestant.app.get("/balance")
    def balance(session: session_type) -> int:
        return int(session.scalar(ledger.SUM) or 0)

    @contestant.app.post("/statements/{number}")
    def statement(order: Order, session: session_type, pages: int) -> StreamingResponse:
        move(order, session)
        return StreamingResponse(print_pages(session, order.id, pages))


def move(order: Order, session: Session) -> None:
    """A transfer's writes."""
    session.execute(ledger.TAKE, {"amount": 1, "id": order.sender})
    if order.pause:
        time.sleep(order.pause)
    session.execute(ledger.TAKE, {"amount": -1, "id": order.recipient})
    session.add(ledger.Transfer(id=order.id))
    session.flush()
    session.add_all(ledger.entries(order.id, order.sender, order.recipient))
    session.flush()


def write_receipt(session: Session, transfer: int) -> None:
    """Work after the response."""
    session.add(ledger.Receipt(transfer_id=transfer))
    session.flush()


def print_pages(session: Session, order: int, pages: int) -> Iterator[bytes]:
    """A body that writes while it goes out."""
    for number in range(pages):
        session.add(ledger.Page(transfer_id=order))
        session.flush()
        yield f"page {number}\n".encode().ljust(4096)
        time.sleep(0.005)


def finish(order: Order, session: Session) -> None:
    """What happens after a transfer's writes."""
    refuse_or_fail(order)
    match order.then:
        case "swallow":
            with suppress(IntegrityError):
                session.execute(ledger.LABEL_AGAIN)
        case "wait":
            session.execute(ledger.SLEEP)
        case "time out":
            session.execute(text("SET LOCAL statement_timeout = '20ms'"))
            try:
                session.execute(ledger.SLEEP)
            except OperationalError:
                raise HTTPException(504, "too slow") from None
