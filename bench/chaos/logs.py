"""What the logs say: the app's, and PostgreSQL's."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from bench.chaos.requests import KINDS

if TYPE_CHECKING:
    from pathlib import Path

CROWD = "pool of 2 for 200 clients"

STRIKES = {
    **{name: kind.logged for name, kind in KINDS.items() if kind.logged},
    CROWD: r"QueuePool limit of size 2 |came free within .*\(pool_size=2\)",
}
"""What is said where it struck."""

AS_IN_DOUBT = "logged as in doubt"

TELLTALES = {
    "SAWarning: The garbage collector is trying": "connections collected",
    "was never awaited": "coroutines never awaited",
    "was destroyed but it is pending": "tasks destroyed",
    # SQLAlchemy's own closing of a connection that gives no answer, if it is cancelled itself.
    r"exception was never retrieved\n(?!.*_terminate_graceful_close)": "exceptions never retrieved",
    "may or may not have been committed": AS_IN_DOUBT,
}
"""What the app's log is read for."""

_IN_DOUBT = re.compile(r"s/(\d+)[: ].*may or may not have been committed")
_FAILED = re.compile(r"^ERROR [\w.]+: (?:POST )?/\w+/(\d+)\b", re.MULTILINE)


@dataclass(frozen=True)
class Told:
    """What the app's log says of requests.

    Attributes:
        in_doubt: Which of them are.

        failed: Of which of them there is an error, before their answer or after it.

        telltales: What must not be, and how often it was.

        text: All of it.
    """

    in_doubt: frozenset[int]
    failed: frozenset[int]
    telltales: Counter[str]
    text: str

    @classmethod
    def read(cls, log: Path) -> Self:
        """Read the log of an app that has ended."""
        text = log.read_text(errors="replace")
        return cls(
            in_doubt=frozenset(map(int, _IN_DOUBT.findall(text))),
            failed=frozenset(map(int, _FAILED.findall(text))),
            telltales=Counter(
                {name: len(re.findall(said, text)) for said, name in TELLTALES.items()}
            ),
            text=text,
        )


def strikes(text: str) -> Counter[str]:
    """How often a log says of each of `STRIKES` that it struck."""
    return Counter(
        {name: len(re.findall(said, text, re.MULTILINE)) for name, said in STRIKES.items()}
    )
