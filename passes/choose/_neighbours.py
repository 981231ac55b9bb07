"""Layers that follow each other: what they save, or lose, by taking formats together.

Two layers of 8-bit values between them need no conversion on the way. What rounding both costs in
quality is rarely the sum of what each costs alone. Both enter the program as pair terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from torch import fx

from mopt.flops import size_hint
from mopt.passes.choose._options import STATIC, Option, Sites
from mopt.passes.choose._program import Pair
from mopt.program import Program

# What works on codes as on the values they stand for, or disappears into the range of a layer.
_TRANSPARENT = (
    "relu", "hardtanh", "relu6", "clamp", "max_pool2d", "flatten", "view", "reshape", "permute",
    "transpose", "contiguous", "clone", "squeeze", "unsqueeze", "dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Neighbours:
    """The group ``writer`` writes what ``reader`` reads, with nothing but moves between them.

    ``share`` is that of the reader among all that read the value. ``written`` and ``read`` are the
    shares of input and output in what a layer's conversions are about.
    """

    writer: int
    reader: int
    share: float
    written: float
    read: float


def find_neighbours(program: Program, sites: Sequence[Sites]) -> list[Neighbours]:
    """Every pair of groups of one layer each, called once, that follow each other directly."""
    owner: dict[fx.Node, int] = {
        one.layers[0].calls[0]: index
        for index, one in enumerate(sites)
        if len(one.layers) == 1
        and len(one.layers[0].calls) == 1
        and one.layers[0].kind in ("linear", "convolution")
    }
    found = []
    for call, writer in owner.items():
        readers = _readers(call)
        for reader, count in _counts(owner.get(node) for node in readers).items():
            if reader == writer:
                continue
            second = sites[reader].layers[0].calls[0]
            found.append(
                Neighbours(
                    writer, reader, count / len(readers), _written_share(call),
                    1 - _written_share(second),
                )
            )  # fmt: skip
    return sorted(found, key=lambda n: (n.writer, n.reader))


def _counts(items: Any) -> dict[int, int]:
    counts: dict[int, int] = {}
    for item in items:
        if item is not None:
            counts[item] = counts.get(item, 0) + 1
    return counts


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value in the end, behind everything that only moves or clips it."""
    found: list[fx.Node] = []
    for user in node.users:
        name = str(user.target).removeprefix("aten.").split(".")[0].rstrip("_")
        if user.op == "call_function" and name in _TRANSPARENT:
            found += _readers(user)
        else:
            found.append(user)
    return found


def _written_share(call: fx.Node) -> float:
    written, read = (prod(size_hint(s) for s in node.meta["val"].shape)
                     for node in (call, call.args[0]))  # fmt: skip
    return written / (written + read)


def saved_times(
    sites: Sequence[Sites], neighbours: Sequence[Neighbours],
    factor: Callable[[Option], float],
) -> list[Pair]:  # fmt: skip
    """What two layers computed in 8 bits save if the value between them stays in 8 bits.

    The reader has nothing to round; the writer has nothing to widen if nobody else reads floats.
    ``factor`` is what was learned of a format's savings.
    """
    pairs = []
    for near in neighbours:
        for i, one in _static(sites[near.writer]):
            for j, other in _static(sites[near.reader]):
                saved = near.share * near.written * one.border_ms * factor(one)
                saved += near.read * other.border_ms * factor(other)
                if saved > 0:
                    pairs.append(Pair(near.writer, i, near.reader, j, {"latency": -saved}))
    return pairs


def _static(one: Sites) -> list[tuple[int, Option]]:
    return [
        (index, option) for index, option in enumerate(one.options)
        if any(name in STATIC for name in option.formats.values())
    ]  # fmt: skip


@dataclass(frozen=True)
class Interaction:
    """What two groups in two formats cost in quality together, beyond the sum of both alone."""

    one: int
    one_option: str
    other: int
    other_option: str
    loss: float


def interactions(
    sites: Sequence[Sites], measure: Callable[[Mapping[str, str]], float], most: int
) -> list[Interaction]:
    """Those of groups that follow each other, in one format.

    Measured at most ``most`` times, where both alone cost most first. Two never cost less than the
    dearer one of them does: along a chain of groups, sums would fall below zero.
    """
    wanted = []
    for first, (one, other) in enumerate(pairwise(sites)):
        for option in one.options[1:]:
            for second in other.options[1:]:
                if option.name == second.name:
                    wanted.append((-option.loss - second.loss, first, option, second))
    wanted.sort(key=lambda item: (item[0], item[1], item[2].name))
    return [
        Interaction(
            first, option.name, first + 1, second.name,
            max(
                measure({**option.formats, **second.formats}) + alone,
                -max(min(option.loss, second.loss), 0.0),
            ),
        )
        for alone, first, option, second in wanted[:most]
    ]  # fmt: skip


def placed(sites: Sequence[Sites], found: Sequence[Interaction]) -> list[Pair]:
    """Interactions as pairs of the options that are there."""
    at = [{option.name: i for i, option in enumerate(one.options)} for one in sites]
    return [
        Pair(one.one, at[one.one][one.one_option], one.other, at[one.other][one.other_option],
             {"loss": one.loss})
        for one in found
        if one.one_option in at[one.one] and one.other_option in at[one.other]
    ]  # fmt: skip


def merged(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """One pair per two candidates, with the amounts of all that are about them."""
    found: dict[tuple[int, int, int, int], dict[str, float]] = {}
    for pair in pairs:
        key = (pair.one, pair.one_candidate, pair.other, pair.other_candidate)
        found.setdefault(key, {}).update(pair.amounts)
    return tuple(Pair(*key, amounts) for key, amounts in found.items())
