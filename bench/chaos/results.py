"""What a run came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bench.chaos.audit import Findings
from bench.chaos.requests import KINDS


@dataclass
class Results:
    """What a run came to.

    Attributes:
        contestant: Who.

        driver: What the app reached PostgreSQL with.

        seconds: How long.

        rounds: How many servers were started and ended.

        faults: What happened to the network and the database.

        kinds: The clients' requests.

        struck: How many of them were what their kind says; by the answer, or by the logs.

        log: What the app's log was read for, how often.

        left: What was left over when the app had come to rest.

        next_tried: Requests after each storm.

        next_failed: Those of them that didn't succeed.

        named: What was left over, and what failed.

        versions: Of what the app ran on.
    """

    contestant: str
    driver: str = "asyncpg"
    seconds: float = 0.0
    rounds: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    wrong_sums: int = 0
    log: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    next_tried: int = 0
    next_failed: int = 0
    named: list[Any] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def faulty(self) -> int:
        """How many faults and faulty requests there were."""
        return self.faults.total() + sum(
            count for kind, count in self.kinds.items() if KINDS[kind].is_faulty
        )
