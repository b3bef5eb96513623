"""The command: two servers, one tour, then at your service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from asgi_dbscope._demo.app import make_app, make_yield_app
from asgi_dbscope._demo.recorder import Recorder
from asgi_dbscope._demo.server import bind, serve
from asgi_dbscope._demo.steps import STEPS, Step
from asgi_dbscope._demo.store import open_stores
from asgi_dbscope._demo.table import Printer
from asgi_dbscope._demo.tour import Site, Visit, visit

if TYPE_CHECKING:
    from collections.abc import Sequence

APPS = {"asgi_dbscope": make_app, "yield dependency": make_yield_app}

INTERRUPTED = 130
"""The exit status after Ctrl-C in mid-tour, as shells have it."""

HINTS = """
Serving until Ctrl-C; what the database does for each request is printed here.

  {0}  asgi_dbscope
  {1}  the same app with a yield dependency

Try on both:

  curl -i {0}/accounts
  curl -i {0}/transfers --json '{{"sender":"alice", "recipient":"bob", "amount":5}}'
  curl -i {0}/transfers --json '{{"sender":"alice", "recipient":"nobody", "amount":5}}'
  curl -i {0}/transfers --json '{{"sender":"alice", "recipient":"bob", "amount":5, "via":"bank"}}'
  curl -o statement.txt '{0}/statement?reader=nobody'
  curl -o archive.txt --limit-rate 2M {0}/archive
"""


@dataclass
class Demo:
    """One run of the command.

    Attributes:
        url: A PostgreSQL database, or ``None`` for an SQLite file.

        port: Of the first app; the other gets the next one. 0 is any.

        once: Whether to end after the tour.

        keep: Whether to leave the tables.

        status: The exit status as far as it is known.
    """

    url: str | None
    port: int
    once: bool
    keep: bool
    steps: Sequence[Step] = tuple(STEPS)
    status: int = INTERRUPTED

    def run(self) -> int:
        """Run to the end, or to Ctrl-C; the exit status."""
        with contextlib.suppress(asyncio.CancelledError, KeyboardInterrupt):
            asyncio.run(self._run())
        return self.status

    async def _run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        for signum in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows has KeyboardInterrupt
                asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
        directory = Path(tempfile.mkdtemp(prefix="asgi_dbscope_demo_"))
        try:
            await self._serve(directory)
        finally:
            if not self.keep:
                shutil.rmtree(directory, ignore_errors=True)

    async def _serve(self, directory: Path) -> None:
        printer = Printer(list(APPS))
        async with AsyncExitStack() as stack:
            # First what may be refused: two ports, then the database.
            listeners = [stack.enter_context(bind(self.port))]
            listeners.append(stack.enter_context(bind(self.port and self.port + 1)))
            stores = await stack.enter_async_context(
                open_stores(self.url, directory, keep=self.keep)
            )
            logging.disable()  # most steps are about errors: they are shown, and not logged too
            sites: list[Site] = []
            for (name, make), store, listener in zip(APPS.items(), stores, listeners, strict=True):
                recorder = Recorder(make(store.sessions))
                url = await stack.enter_async_context(serve(recorder, listener))
                sites.append(Site(name, url, recorder, store))
            printer.print(f"A ledger on {stores[0]}, served by uvicorn on {sites[0].url}")
            self.status = await self._tour(sites, printer)
            if not self.once:
                for site in sites:
                    await site.store.reset()
                    site.recorder.on_over = partial(printer.print_exchange, site.name)
                printer.print(HINTS.format(*(site.url for site in sites)))
                await asyncio.Event().wait()

    async def _tour(self, sites: list[Site], printer: Printer) -> int:
        """Visit every step; the exit status."""
        visits: list[list[Visit]] = []
        for number, step in enumerate(self.steps, 1):
            visits.append([await visit(site, step) for site in sites])
            printer.print_step(number, visits[-1])
        printer.print_summary(visits)
        return 0 if all(ours.is_kept for ours, _ in visits) else 1
