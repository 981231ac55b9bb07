"""Compute convolutions and linear layers in int8, with ranges found on calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from mopt.formats import Encoded, Format, Grid
from mopt.formats.base import require_finite
from mopt.formats.grid import min_max_grid
from mopt.formats.int_rows import Int8Qdq
from mopt.layers import Layer, find_layers
from mopt.machine import trim_heap
from mopt.observers import Histogram, MinMax
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, option, register_pass
from mopt.passes.quantize._codes import fit_bias, insert_codes, quantize_bias
from mopt.passes.quantize._edges import find_edges
from mopt.passes.quantize._means import correct_means
from mopt.passes.quantize._weights import encoding_error
from mopt.program import Program
from mopt.ranges import METHODS, estimate_range, range_observer


@register_pass("quantize-static", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class QuantizeStatic(Pass):
    """Compute convolutions and linear layers in int8, with ranges found on calibration data.

    ## When to use
    Convolutional networks on a CPU, and encoders of fixed shape, when 100 to 1000 samples like
    those the model will meet are at hand.

    ## Accuracy
    Weights are symmetric int8 with a scale per output channel. Each value between layers has one
    range, from `calibration`: all that was seen, its average over batches, a percentile, the least
    squared error or the least divergence. Values outside it are clipped. Inputs of softmax, norms,
    GELU and the like stay in float. `weights = "tensor"` gives all channels of a weight one scale,
    for runtimes that know no other; it is stored per channel all the same. `correct_bias` takes the
    mean of what rounding a weight adds to its layer's output off the bias (Nagel et al. 2019,
    section 4.2), measured in a pass over the data of its own.

    ## Limits
    float32 models. Transposed convolutions stay in float. On x86 processors without VNNI set
    `reduce_range`, which keeps weight codes within [-64, 64].

    ## Example
    conv, relu, max_pool, conv becomes one chain of 8-bit values: the relu disappears into the
    range, and the pooling works on the codes.
    """

    calibration: str = option("mse", choices=METHODS, help="how ranges are chosen")
    percentile: float = option(99.99, min=50, max=100, help="share of values to cover, in percent")
    activations: str = option(
        "uint8", choices=("uint8", "int8"), help="codes of values between layers"
    )
    ranges: str = option("mse", choices=("mse", "min-max"), help="how weight scales are chosen")
    weights: str = option(
        "channel", choices=("channel", "tensor"), help="whether each output channel has its scale"
    )
    correct_bias: bool = option(False, help="keep the means of outputs, by a shift of the biases")
    reduce_range: bool = option(False, help="7-bit weights, for x86 processors without VNNI")
    keep_first: bool = option(False, help="leave layers that read the model's input in float")
    keep_last: bool = option(False, help="leave layers that no other layer follows in float")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if ctx.calibration is None:
            return (
                "needs calibration data for the ranges of values between layers; pass "
                "calibration=[inputs, ...] (or --calib), or quantize with ranges found at run time"
            )
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        skipped: list[Skip] = []
        encoded = self._encode_weights(program, ctx, skipped)
        calls = {call for layer in encoded for call in layer.calls}
        edges = find_edges(program, calls)
        for layer in list(encoded):
            if any(call.args[0] not in edges.source for call in layer.calls):
                skipped.append(Skip(layer.path, "its input is a constant or is changed in place"))
                del encoded[layer]
        if not encoded:
            return PassResult(changed=False, stats={"layers": 0}, skipped=skipped)
        if len({call for layer in encoded for call in layer.calls}) != len(calls):
            edges = find_edges(program, {call for layer in encoded for call in layer.calls})

        observers = {edge: range_observer(self.calibration) for edge in set(edges.source.values())}
        format_ = self._format
        corrected = 0
        if self.correct_bias:
            corrected = correct_means(
                program, ctx, {x: partial(self._change, program, x, encoded[x]) for x in encoded}
            )
        rounded = _Decoded(format_, encoded)
        batches = ctx.calibration.for_part(program).collect(observers, ctx, rounded)
        grids = {edge: self._grid(observer) for edge, observer in observers.items()}

        error: dict[str, float] = {}
        for layer, one in encoded.items():
            weight = program.weight(layer.weight)
            final = fit_bias(program, layer, one, format_, edges, grids)
            error[layer.path] = encoding_error(format_, weight, final)
            format_.place(program, layer, final)
            for call in layer.calls:
                quantize_bias(program, call, final, grids[edges.source[call.args[0]]])
            del weight
            trim_heap()
        calls = {call for layer in encoded for call in layer.calls}
        folded = insert_codes(program, calls, edges, grids, self._zero_dtype)
        return PassResult(
            changed=True,
            stats={
                "layers": len(encoded),
                "edges": len(edges.source),
                "folded_activations": folded,
                "batches": batches,
                **({"corrected_biases": corrected} if self.correct_bias else {}),
                "formats": {layer.path: format_.name for layer in encoded},
                "weight_error": error,
            },
            skipped=skipped,
        )

    @property
    def _format(self) -> Int8Qdq:
        return Int8Qdq(reduced=self.reduce_range)

    def _change(self, program: Program, layer: Layer, encoded: Encoded, at: slice) -> Tensor:
        """What rounding adds to some rows of a layer's weight."""
        rounded = self._format.decode(encoded.rows(at))
        return rounded - program.weight(layer.weight)[at]

    @property
    def _zero_dtype(self) -> torch.dtype:
        return torch.uint8 if self.activations == "uint8" else torch.int8

    def _encode_weights(
        self, program: Program, ctx: PassContext, skipped: list[Skip]
    ) -> dict[Layer, Encoded]:
        layers = [x for x in find_layers(program) if x.kind in ("linear", "convolution")]
        first, last = _ends(program, {call for layer in layers for call in layer.calls})
        encoded: dict[Layer, Encoded] = {}
        for layer in layers:
            ctx.check_time(f"encoding {layer.path}")
            if not self.selects(layer.path):
                continue
            weight = program.weight(layer.weight)
            require_finite(weight, layer.path, layer.source)
            reason = self._format.check(layer, weight)
            if reason is None and self.keep_first and first & set(layer.calls):
                reason = "it reads the model's input, and keep_first is set"
            if reason is None and self.keep_last and last & set(layer.calls):
                reason = "no other layer follows it, and keep_last is set"
            if reason:
                skipped.append(Skip(layer.path, reason))
            else:
                grid = self._weight_grid(weight)
                encoded[layer] = self._format.encode(weight, grid=grid)
                trim_heap()
        return encoded

    def _weight_grid(self, weight: Tensor) -> Grid:
        if self.weights == "channel":
            return self._format.grid(weight, ranges=self.ranges)
        whole = self._format.grid(weight.reshape(1, -1), ranges=self.ranges)
        return Grid(whole.scales.expand(len(weight), 1).contiguous())

    def _grid(self, observer: Histogram | MinMax) -> Grid:
        """Scale and zero point, as scalars, in the code range of the option ``activations``."""
        symmetric = self.activations == "int8" and observer.low < 0
        low, high = estimate_range(
            observer, self.calibration, symmetric=symmetric, percentile=self.percentile
        )
        grid = min_max_grid(torch.tensor(low), torch.tensor(high), 8, symmetric)
        zero = torch.zeros(()) if grid.zero_points is None else grid.zero_points
        if self.activations == "int8" and not symmetric:
            zero = zero - 128
        return Grid(grid.scales, zero.to(self._zero_dtype))


def _ends(program: Program, calls: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The calls before and after which there is no other."""
    after: set[fx.Node] = set()
    before: set[fx.Node] = set()
    for node in program.graph.nodes:
        if any(i in after or i in calls for i in node.all_input_nodes):
            after.add(node)
    for node in reversed(program.graph.nodes):
        if any(u in before or u in calls for u in node.users):
            before.add(node)
    return calls - after, calls - before


class _Decoded(Mapping[tuple[fx.Node, fx.Node], Tensor]):
    """Rounded weights by (call, reader), decoded anew whenever they are asked for.

    To hold them all would take the memory of another float model.
    """

    def __init__(self, form: Format, encoded: Mapping[Layer, Encoded]) -> None:
        self._form = form
        self._encoded: dict[Any, Encoded] = {
            (call, call.args[1]): one for layer, one in encoded.items() for call in layer.calls
        }

    def __contains__(self, key: object) -> bool:
        return key in self._encoded

    def __getitem__(self, key: tuple[fx.Node, fx.Node]) -> Tensor:
        return self._form.decode(self._encoded[key])

    def __iter__(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        return iter(self._encoded)

    def __len__(self) -> int:
        return len(self._encoded)
