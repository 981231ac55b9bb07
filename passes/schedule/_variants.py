"""The instances on which a layout is searched: the given one and ways of gluing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mopt.memory import Piece, Storage
from mopt.passes.schedule import _greedy
from mopt.passes.schedule._contract import BLOCKS, GUESSES, PAIRS, STACKS, contract, unfold
from mopt.passes.schedule._instance import Instance
from mopt.passes.schedule._run import Ready

AS_IS = 0


class Variant(NamedTuple):
    """How strongly items are glued, whether free room becomes items, and a seed for guesses."""

    level: int
    fill: bool = False
    seed: int = 0


# From what solves most to what solves least.
USUAL = (
    Variant(BLOCKS), Variant(STACKS), Variant(PAIRS, True), Variant(PAIRS), Variant(STACKS, True),
    Variant(AS_IS), Variant(BLOCKS, True),
)  # fmt: skip


def guesses(seeds: Sequence[int]) -> Iterator[Variant]:
    """One variant for each seed, every other one with free room filled."""
    for k, seed in enumerate(seeds):
        yield Variant(GUESSES, k % 2 == 1, seed)


class Variants:
    """Makes variants when they are asked for, keeps them, and takes layouts of them back."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self._ready: dict[tuple[Variant, int | None], Ready] = {}

    def ready(self, variant: Variant, target: int) -> Ready:
        """The instance of a variant; ``target`` bytes is what free room is filled up to."""
        key = (variant, target if variant.fill else None)
        if key not in self._ready:
            # Guesses, and what was filled to other targets, are not asked for again.
            self._ready = {
                k: v for k, v in self._ready.items()
                if k[0].level != GUESSES and k[1] in (None, target)
            }  # fmt: skip
            height = self.instance.room(target) if variant.fill else None
            self._ready[key] = Ready(
                contract(self.instance, variant.level, height, variant.seed)
                if variant.level else self.instance
            )  # fmt: skip
        return self._ready[key]

    def original(self, variant: Variant, ready: Ready, offsets: Sequence[int]) -> Sequence[int]:
        """Offsets of the given instance's items from those of a variant, in grains."""
        if variant.level == AS_IS:
            return offsets
        return unfold(ready.instance, offsets, len(self.instance.items))


def greedy_on(ready: Ready, is_over: Callable[[], bool]) -> Iterator[list[int]]:
    """Layouts of an instance by every greedy rule, in grains."""
    storages = [
        Storage(
            str(k), (), item.size, item.align,
            tuple(Piece(lower, upper, 0, item.size) for lower, upper in item.spans),
            "", None if item.fixed < 0 else item.fixed, None,
        )
        for k, item in enumerate(ready.instance.items)
    ]  # fmt: skip
    for rule in _greedy.rules(storages):
        offsets = _greedy.place(storages, rule.order, rule.best_fit, is_over=is_over)
        yield [offsets[s.id] for s in storages]
