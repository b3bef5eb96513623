"""Which Python functions a request's bytecodes are spent in."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import CodeType

    from bench.served import Served

WARM, REQUESTS = 50, 10
Spent = dict[str, tuple[float, float]]
"""Bytecodes and calls for one request, by function."""


async def spend(served: Served, route: str) -> Spent:
    """Count them, in the contestant's process."""
    monitoring: Any = vars(sys)["monitoring"]  # since Python 3.12
    events = monitoring.events
    bytecodes, calls = Counter[str](), Counter[str]()

    def step(code: CodeType, _offset: int) -> None:
        bytecodes[_name(code)] += 1

    def start(code: CodeType, _offset: int) -> None:
        calls[_name(code)] += 1

    await served.serve(route, WARM)
    monitoring.use_tool_id(monitoring.PROFILER_ID, "bench")
    monitoring.register_callback(monitoring.PROFILER_ID, events.INSTRUCTION, step)
    monitoring.register_callback(monitoring.PROFILER_ID, events.PY_START, start)
    monitoring.set_events(monitoring.PROFILER_ID, events.INSTRUCTION | events.PY_START)
    await served.serve(route, REQUESTS)
    monitoring.set_events(monitoring.PROFILER_ID, 0)
    monitoring.free_tool_id(monitoring.PROFILER_ID)
    return {name: (bytecodes[name] / REQUESTS, calls[name] / REQUESTS) for name in bytecodes}


def _name(code: CodeType) -> str:
    path = Path(code.co_filename)
    return f"{path.parent.name}/{path.name} {code.co_qualname}"


def lines(after: Spent, before: Spent | None, count: int) -> list[str]:
    """What is spent most, or what changed most, and the total."""
    then = before or {}
    changes: Spent = {}
    for name in {**then, **after}:
        (bytecodes, calls), (earlier, earlier_calls) = (
            each.get(name, (0.0, 0.0)) for each in (after, then)
        )
        changes[name] = bytecodes - earlier, calls - earlier_calls
    ordered = sorted(changes.items(), key=lambda each: -abs(each[1][0]))
    head = f"{'bytecodes':>10}{'calls':>8}"
    rows = [
        f"{bytecodes:10.1f}{calls:8.1f}  {name}"
        for name, (bytecodes, calls) in ordered[:count]
        if bytecodes
    ]
    total = sum(bytecodes for bytecodes, _ in changes.values())
    return [head, *rows, f"{total:10.1f}{'':8}  in all"]
