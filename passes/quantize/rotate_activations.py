"""Spread large activations over their neighbours before they are rounded to 8 bits (Hadamard)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopt.formats.base import require_finite, shared_weight
from mopt.pass_base import (
    NEEDS_DATA,
    Numerics,
    Pass,
    PassContext,
    PassResult,
    Skip,
    option,
    register_pass,
)
from mopt.passes.quantize._calibrated import Group, visit_inputs
from mopt.passes.quantize._scales import find_edges_to_scale, first_reader, set_weight
from mopt.passes.quantize._trials import rounded_error, spread_rows
from mopt.program import Program
from mopt.streaming import Stream

_aten = torch.ops.aten
# A rotation with an extra step is taken where it leaves this share of what the next simpler one
# leaves: a gather, or a gather and a second product, are paid for on every call.
_WORTH_A_STEP = 0.8


@register_pass("rotate-activations", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class RotateActivations(Pass):
    """Spread large activations over their neighbours before they are rounded to 8 bits.

    ## When to use
    Before weights and activations are rounded to int8, when a few large values per row, in
    changing channels, make the range wide: behind GELU and gates, above all. Channels that are
    always large are better rescaled first.

    ## Accuracy
    Rounding: the function stays. Each block of channels is multiplied by an orthogonal Hadamard
    matrix in front of the layers that read it, and their weights by the same matrix, in float64.
    Where: at the inputs whose layers' outputs, on up to `rows` rows of calibration data and
    rounded as they will be, lose at least a tenth of their error. The idea of QuaRot (Ashkboos
    et al. 2024), in blocks, and for each input by itself: nothing is folded across the residual.

    `kind = "adaptive"` also tries rotations that know where the large channels are: channels are
    first dealt out to the blocks by size, to and fro, so that every block gets its share ("dealt"),
    and, where that is not enough, are rotated once before that too ("dual"). Each step must lower
    the error by a fifth. LRQ-DiT (2025) chooses between a Hadamard and an outlier-aware rotation by
    the size of activations; its published summary left room, and this is a design of our own in
    its spirit, which chooses by the error itself: not a reproduction.

    ## Limits
    Inputs of linear layers whose length is a multiple of `block`. The multiplication runs in
    float: in blocks of 32 it adds 32 products per value, beside as many as the layer has outputs.

    ## Example
    On all-MiniLM-L6-v2 the error of 4 of 6 outputs behind GELU falls by half and more.
    """

    kind: str = option(
        "hadamard", choices=("hadamard", "adaptive"),
        help="adaptive: also try rotations that spread channels which are always large over blocks",
    )  # fmt: skip
    block: int = option(32, choices=(16, 32, 64, 128), help="channels that are mixed")
    keep: float = option(0.9, min=0, max=1, help="rotate where at most this share of error is left")
    rows: int = option(512, min=1, help="rows of activations that are compared on")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        edges, skipped = find_edges_to_scale(program, self.selects, insert=True)
        groups = []
        for edge in edges:
            layer = edge.group.layers[0]
            if layer.shape[1] % self.block:
                reason = f"in_features {layer.shape[1]} is not a multiple of block {self.block}"
                skipped.append(Skip(edge.path, reason))
                continue
            for one in edge.group.layers:
                require_finite(program.weight(one.weight), one.path, one.source)
            groups.append(edge.group)
        if not groups:
            return PassResult(changed=False, stats={"edges": 0}, skipped=skipped)
        stream = Stream(program, ctx.calibration.for_part(program), ctx)
        left: dict[str, float] = {}
        kinds: dict[str, str] = {}
        chosen: list[tuple[Group, Rotation]] = []
        for group, value, _ in visit_inputs(program, stream, groups):
            path = ",".join(layer.path for layer in group.layers)
            ctx.progress.step(len(left), len(groups), "edges")
            ctx.check_time(f"rotating the inputs of {path}")
            weights = [program.weight(layer.weight) for layer in group.layers]
            rotation, left[path] = self._choose(stream.values(value), weights)
            if left[path] <= self.keep:
                chosen.append((group, rotation))
                kinds[path] = rotation.kind
            else:
                skipped.append(Skip(path, f"a rotation leaves {left[path]:.0%} of the error"))
        for group, rotation in chosen:
            _rotate(program, group, rotation)
        stats: dict[str, Any] = {
            "edges": len(chosen), "error_left": left, "kinds": kinds,
            "peak_activation_bytes": stream.peak_bytes,
        }  # fmt: skip
        return PassResult(changed=bool(chosen), stats=stats, skipped=skipped)

    def _choose(self, values: list[Tensor], weights: list[Tensor]) -> tuple[Rotation, float]:
        """The simplest rotation that no other beats clearly, and the share of error it leaves."""
        share = max(1, self.rows // len(values))
        rows = torch.cat([spread_rows(value, share) for value in values])
        best = Rotation(hadamard(self.block))
        least = error_left(rows, weights, best)
        if self.kind == "hadamard":
            return best, least
        for twice in (False, True):
            once = Rotation(best.matrix) if twice else None
            seen = (value.float().reshape(-1, value.shape[-1]) for value in values)
            largest = torch.stack(
                [(once(value) if once else value).abs().amax(0) for value in seen]
            ).amax(0)
            tried = Rotation(best.matrix, deal(largest, self.block), twice)
            error = error_left(rows, weights, tried)
            if error <= _WORTH_A_STEP * least:
                best, least = tried, error
        return best, least


@dataclass(frozen=True)
class Rotation:
    """What is done to a value's channels, and to the columns of the weights that read it.

    Each block times ``matrix`` (size, size), orthogonal; before that the channels are put in
    ``order``, if there is one, and before that each block is multiplied once more if ``twice``.
    """

    matrix: Tensor
    order: Tensor | None = None
    twice: bool = False

    @property
    def kind(self) -> str:
        """ "hadamard", "dealt" or "dual"."""
        return "hadamard" if self.order is None else "dual" if self.twice else "dealt"

    def __call__(self, values: Tensor) -> Tensor:
        """The last axis of ``values`` rotated, in their dtype."""
        matrix = self.matrix.to(values)
        if self.twice:
            values = rotate(values, matrix)
        if self.order is not None:
            values = values[..., self.order]
        return rotate(values, matrix)


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix (size, size), float64; ``size`` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def rotate(values: Tensor, matrix: Tensor) -> Tensor:
    """Each block of the last axis times ``matrix``."""
    return (values.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def deal(largest: Tensor, block: int) -> Tensor:
    """An order of channels in which the largest are spread evenly over blocks of that length.

    They are dealt out by size, to and fro, as DuQuant's zigzag permutation does it.
    """
    turns = torch.argsort(largest, descending=True, stable=True).view(block, -1)
    turns[1::2] = turns[1::2].flip(1)
    return turns.t().flatten()


def error_left(rows: Tensor, weights: list[Tensor], rotation: Rotation) -> float:
    """The squared error in 8 bits behind a rotation, as a share of that without it."""
    plain = rounded_error(rows, weights)
    return rounded_error(rotation(rows), weights, rotation) / plain if plain > 0 else 1.0


def _rotate(program: Program, group: Group, rotation: Rotation) -> None:
    value, first = group.inputs[0], first_reader(program, group)
    for layer in group.layers:
        set_weight(program, layer.calls[0], rotation)
    matrix = rotation.matrix.to(value.meta["val"].dtype)
    stored = shared_weight(program, "hadamard", matrix, first)
    count = group.layers[0].shape[1] // len(matrix)

    def multiplied(x: Any) -> Any:
        split = program.insert_call(_aten.unflatten.int, (x, -1, [count, len(matrix)]), like=first)
        mixed = program.insert_call(_aten.matmul.default, (split, stored), like=first)
        return program.insert_call(_aten.flatten.using_ints, (mixed, -2, -1), like=first)

    if rotation.twice:
        value = multiplied(value)
    if rotation.order is not None:
        order = shared_weight(program, "channel_order", rotation.order, first)
        value = program.insert_call(_aten.index_select.default, (value, -1, order), like=first)
    value = multiplied(value)
    for layer in group.layers:
        layer.calls[0].update_arg(0, value)
