"""The tour: each step's request sent to an app over HTTP, and judged by what was measured."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from asgi_dbscope._demo.steps import Facts, Step, judge

if TYPE_CHECKING:
    from asgi_dbscope._demo.recorder import Recorder
    from asgi_dbscope._demo.store import Store

TIMEOUT = 30.0
"""Seconds that one request may take, background work included."""

PAUSE = 0.2
"""Seconds that a client which takes its time takes; only what is printed depends on it."""

NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Loopback has no TLS; without this each client would read the machine's, which takes a while."""


@dataclass(frozen=True)
class Site:
    """One of the two apps, as it is served."""

    name: str
    url: str
    recorder: Recorder
    store: Store


@dataclass(frozen=True)
class Visit:
    """What came of one step at one site.

    Attributes:
        verdicts: Whether each claim of the step is true.
    """

    step: Step
    facts: Facts
    verdicts: dict[str, bool]

    @property
    def is_kept(self) -> bool:
        """Whether all is as promised."""
        return all(self.verdicts.values())


async def visit(site: Site, step: Step) -> Visit:
    """Send the step's request to *site*, and look what came of it."""
    await site.store.reset()
    method, path, json = step.request
    is_complete = step.client != "leaves"
    async with (
        httpx.AsyncClient(
            base_url=site.url, trust_env=False, timeout=TIMEOUT, verify=NO_CERTIFICATES
        ) as client,
        client.stream(method, path, json=json) as response,
    ):
        exchange = site.recorder.latest
        assert exchange is not None
        if step.client != "reads":
            async with asyncio.timeout(TIMEOUT):
                await exchange.has_body.wait()
            await asyncio.sleep(PAUSE)
        held = site.store.held()
        try:
            if step.client != "leaves":
                await response.aread()
        except httpx.RemoteProtocolError:
            is_complete = False
    async with asyncio.timeout(TIMEOUT):
        await exchange.is_over.wait()
    rows = await site.store.rows()
    facts = Facts(
        status=response.status_code,
        is_complete=is_complete,
        timeline=exchange.timeline,
        rows={name: count for name, count in rows.items() if count},
        held=held,
        left=site.store.held(),
    )
    return Visit(step, facts, judge(step.claims, facts))
