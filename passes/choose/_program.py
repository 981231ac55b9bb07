"""The choice of one candidate per group of layers, as data; solving it is in ``_solver``.

    minimize  sum of amounts[minimize]   subject to   sum of amounts[q] <= limits[q] for every q

Amounts are differences from the uncompressed model or absolute, as the caller likes, in bytes
(size, memory), ms (latency), mJ (energy) and shares of quality (loss). A pair adds amounts,
positive or negative, when two groups take two certain candidates together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

QUANTITIES = ("size", "latency", "memory", "energy", "loss")
# Sums of floats in another order may exceed a limit that they equal by this share.
SLACK = 1e-9


@dataclass(frozen=True)
class Candidate:
    """One thing a group may become, and what it takes of each quantity (0 where not given)."""

    name: str
    amounts: Mapping[str, float]

    def amount(self, quantity: str) -> float:
        """How much of a quantity the candidate takes."""
        return float(self.amounts.get(quantity, 0.0))


@dataclass(frozen=True)
class Group:
    """Layers that must become the same thing; names are unique in a problem."""

    name: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Pair:
    """What is added to the sums when two groups take these candidates, by index."""

    one: int
    one_candidate: int
    other: int
    other_candidate: int
    amounts: Mapping[str, float]

    def amount(self, quantity: str) -> float:
        """How much of a quantity the pair adds."""
        return float(self.amounts.get(quantity, 0.0))

    def is_taken(self, choice: Sequence[int]) -> bool:
        """Whether a choice takes both candidates."""
        return choice[self.one] == self.one_candidate and choice[self.other] == self.other_candidate


@dataclass(frozen=True)
class Problem:
    """Groups, what to minimize, and the limits on the sums."""

    groups: tuple[Group, ...]
    minimize: str
    limits: Mapping[str, float] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        unknown = {self.minimize, *self.limits} - set(QUANTITIES)
        assert not unknown, unknown
        assert all(group.candidates for group in self.groups)
        names = [group.name for group in self.groups]
        assert len(set(names)) == len(names), names

    def total(self, choice: Sequence[int], quantity: str) -> float:
        """The sum of a quantity over the chosen candidates, pairs included."""
        total = sum(
            group.candidates[index].amount(quantity)
            for group, index in zip(self.groups, choice, strict=True)
        )
        return total + sum(pair.amount(quantity) for pair in self.pairs if pair.is_taken(choice))

    def totals(self, choice: Sequence[int]) -> dict[str, float]:
        """Every quantity's sum."""
        return {quantity: self.total(choice, quantity) for quantity in QUANTITIES}

    def excess(self, choice: Sequence[int]) -> dict[str, float]:
        """By how much each broken limit is exceeded; empty for a feasible choice."""
        found = {}
        for quantity, limit in self.limits.items():
            over = self.total(choice, quantity) - limit
            if over > SLACK * max(abs(limit), self.scale(quantity)):
                found[quantity] = over
        return found

    def pairs_of(self, group: int) -> list[Pair]:
        """The pairs that a group is in."""
        return [pair for pair in self.pairs if group in (pair.one, pair.other)]

    def scale(self, quantity: str) -> float:
        """A typical magnitude of a quantity's sum, positive: to compare unlike quantities."""
        largest = sum(
            max(abs(c.amount(quantity)) for c in group.candidates) for group in self.groups
        )
        return largest or 1.0

    def table(self, quantity: str) -> np.ndarray:
        """Amounts by group and candidate, infinite where a group has fewer candidates."""
        width = max((len(group.candidates) for group in self.groups), default=1)
        table = np.full((len(self.groups), width), np.inf)
        for row, group in enumerate(self.groups):
            table[row, : len(group.candidates)] = [c.amount(quantity) for c in group.candidates]
        return table


@dataclass(frozen=True)
class Solution:
    """A choice (an index per group) and what is known about it.

    ``status`` is ``optimal`` (within the gap asked for), ``time`` (the best found when time was
    up) or ``infeasible``: then ``choice`` is the nearest point, which exceeds the limits by
    ``excess``, and ``alone`` has the least value each of them could have without the others.
    ``bound`` is proved: no choice is below it. ``prices`` says by how much the objective falls per
    unit of a limit (0 where it does not bind), from the linear relaxation. ``checks`` are the
    objectives of the greedy and the Lagrangian solution, None where they found no feasible one.
    """

    choice: tuple[int, ...]
    status: str
    objective: float
    bound: float
    totals: Mapping[str, float]
    prices: Mapping[str, float] = field(default_factory=dict)
    excess: Mapping[str, float] = field(default_factory=dict)
    alone: Mapping[str, float] = field(default_factory=dict)
    checks: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def gap(self) -> float:
        """How far the objective may be from the best, as a share of its magnitude."""
        if self.objective - self.bound <= 0:
            return 0.0
        return (self.objective - self.bound) / max(abs(self.objective), 1e-12)

    @property
    def binding(self) -> tuple[str, ...]:
        """The limits that cannot be met, or else those whose price is not zero."""
        return tuple(self.excess) or tuple(q for q, price in self.prices.items() if price > 0)
