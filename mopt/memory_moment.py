"""The fullest moment of a memory plan: which step it is, and what is alive then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_SHOWN = 5


@dataclass(frozen=True)
class Moment:
    """A step of a plan with what it needs: its own workspace, and buffers, the largest first.

    ``buffers`` are rows of the plan; memory that a result took over is listed once.
    """

    step: int
    node: str
    bytes: int
    workspace_bytes: int
    buffers: tuple[Mapping[str, Any], ...]

    def text(self) -> str:
        """The moment in one line: 4,096 bytes in step 3 (relu): conv2d (2,048), relu (2,048)."""
        told = [f"{row['id']} ({row['bytes']:,})" for row in self.buffers[:_SHOWN]]
        if self.workspace_bytes:
            told.append(f"{self.workspace_bytes:,} of workspace")
        more = len(self.buffers) - _SHOWN
        told += [f"{more} smaller ones"] if more > 0 else []
        return f"{self.bytes:,} bytes in step {self.step} ({self.node}): {', '.join(told)}"


def busy(plan: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], int, int]]:
    """Rows of a plan's buffers with the steps ``[lower, upper)`` in which they hold bytes that no
    other row holds: a result in another's memory counts from when the other is done."""
    rows = {row["id"]: row for row in plan["buffers"]}
    for row in rows.values():
        shared = rows.get(row["shares"])
        lower = row["lower"] if shared is None else max(row["lower"], shared["upper"])
        if row["bytes"] and lower < row["upper"]:
            yield row, lower, row["upper"]


def fullest_moment(plan: Mapping[str, Any]) -> Moment | None:
    """The first step of ``plan`` (as plan.json holds it) at which most bytes are alive at once;
    None for a plan without steps."""
    steps = plan["steps"]
    needs = [step["workspace_bytes"] for step in steps]
    rows = list(busy(plan))
    for row, lower, upper in rows:
        for step in range(lower, min(upper, len(steps))):
            needs[step] += row["bytes"]
    if not needs:
        return None
    most = max(range(len(needs)), key=needs.__getitem__)
    alive = [row for row, lower, upper in rows if lower <= most < upper]
    alive.sort(key=lambda row: (-row["bytes"], row["id"]))
    return Moment(
        most, steps[most]["node"], needs[most], steps[most]["workspace_bytes"], tuple(alive)
    )
