"""What pairs of samples say, and how sure that is, over several processes of the same code."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MISSED = 0.025
"""How probable it is, on either side, that an interval of one process doesn't reach its median."""


@dataclass(frozen=True)
class Estimate:
    """A figure, and between which two it is.

    Attributes:
        value: The median of all pairs.

        low: The lowest that one of the processes by itself could mean.

        high: The highest.
    """

    value: float
    low: float
    high: float

    def told(self, shown: str) -> str:
        """All three, each written as `shown` says."""
        return f"{shown}: {shown} to {shown}".format(self.value, self.low, self.high)


def exactly(value: float) -> Estimate:
    """What is counted, and isn't a matter of chance."""
    return Estimate(value, value, value)


def about(value: float, spread: float) -> Estimate:
    """What repeats to so much."""
    return Estimate(value, value - spread, value + spread)


def estimate(processes: Sequence[Sequence[float]]) -> Estimate:
    """Of each process its pairs.

    Processes of the same code differ, so the interval reaches over what each of them says: it is on
    one side of a figure only where every process by itself is.
    """
    intervals = [interval(each) for each in processes]
    return Estimate(
        statistics.median([pair for each in processes for pair in each]),
        min(low for low, _ in intervals),
        max(high for _, high in intervals),
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which two of them their median is, with 95 %.

    By the sign test, which asks nothing of how they are distributed; with less than six, the lowest
    and the highest.
    """
    ordered = sorted(values)
    number = len(ordered)
    rank, missed = 0, 0.0
    while (missed := missed + math.comb(number, rank) / 2**number) <= MISSED:
        rank += 1
    rank = max(0, rank - 1)
    return ordered[rank], ordered[-1 - rank]
