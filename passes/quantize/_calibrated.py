"""What the passes share that round one layer after another on streamed calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from mopt.formats import Encoded, Grid, GridFormat
from mopt.formats.base import require_finite, row_pieces
from mopt.layers import Layer, find_layers
from mopt.machine import trim_heap
from mopt.pass_base import Pass, PassContext, PassResult, Skip
from mopt.passes.quantize._weights import (
    data_key,
    encoding_key,
    find_encoding,
    keep_encoding,
)
from mopt.program import Program
from mopt.second_order import output_error, solve_in_place
from mopt.streaming import Stream

_BUCKET = "on-data"
# Values that are rounded together: columns go one by one, for all rows of a piece at once.
_ROUNDED_TOGETHER = 1 << 20


@dataclass(frozen=True)
class Group:
    """Layers that read the same values; ``inputs`` is that value in each of their calls."""

    inputs: tuple[fx.Node, ...]
    layers: tuple[Layer, ...]


def input_groups(layers: list[Layer]) -> list[Group]:
    """Layers by what they read, in the order of their first calls."""
    found: dict[tuple[fx.Node, ...], list[Layer]] = {}
    for layer in layers:
        key = tuple(call.args[0] for call in layer.calls)
        found.setdefault(key, []).append(layer)  # type: ignore[arg-type]
    return [Group(inputs, tuple(members)) for inputs, members in found.items()]


def visit_inputs(
    program: Program, stream: Stream, groups: list[Group], original: Stream | None = None
) -> Iterator[tuple[Group, fx.Node, bool]]:
    """Each group with what one of its calls reads, when the streams get there, and if it was last.

    A group that is called several times comes that often.
    """
    place = {node: at for at, node in enumerate(program.graph.nodes)}
    stops = []
    for group in groups:
        for turn, value in enumerate(group.inputs):
            call = min((layer.calls[turn] for layer in group.layers), key=place.__getitem__)
            stops.append((place[call], call, group, value))
    left = {group.inputs: len(group.inputs) for group in groups}
    for _, call, group, value in sorted(stops, key=lambda stop: stop[0]):
        stream.advance(call)
        if original is not None:
            original.advance(call)
        left[group.inputs] -= 1
        yield group, value, left[group.inputs] == 0


@dataclass(frozen=True)
class Moments:
    """What a group reads: the second moment (K, K) of its values, and how far they have drifted.

    ``drift`` is the mean of (x - y) y^T for x the original model's values and y the ones read now,
    (K, K), None where the original model did not run beside.
    """

    second: Tensor
    drift: Tensor | None = None

    def plus(self, other: Moments) -> Moments:
        """The sum of both."""
        assert (self.drift is None) == (other.drift is None)
        drift = None if self.drift is None or other.drift is None else self.drift + other.drift
        return Moments(self.second + other.second, drift)


def visit_groups(
    program: Program, stream: Stream, groups: list[Group], original: Stream | None = None
) -> Iterator[tuple[Group, Moments]]:
    """Each group with the moments of what it reads, when the stream gets to it.

    A group that is called several times comes at its last call, with the mean over its calls.
    """
    moments: dict[tuple[fx.Node, ...], Moments] = {}
    for group, value, last in visit_inputs(program, stream, groups, original):
        count = len(group.inputs)
        drift = None if original is None else stream.drift(value, original).div_(count)
        share = Moments(stream.second_moment(value).div_(count), drift)
        known = moments.pop(group.inputs, None)
        moments[group.inputs] = share if known is None else known.plus(share)
        del drift, share, known  # while its reader works, nothing else is held
        if last:
            yield group, moments.pop(group.inputs)


def correction(moments: Moments, damping: float = 0.01) -> Tensor | None:
    """C (K, K), float32, for which a weight W + W C comes nearest to the original outputs of W.

    On what is read now: the least squares solution D (H + damping)^-1 with D the drift and H the
    second moment (Li et al. 2025, "GPTAQ", for its target); None where there is no drift. It takes
    the place of the drift.
    """
    if moments.drift is None:
        return None
    h = moments.second.to(torch.float64, copy=True)
    h.diagonal().add_(damping * h.diagonal().mean().clamp(min=1e-30))
    return moments.drift if solve_in_place(h, moments.drift) else None


Encode = Callable[[Layer, Tensor, GridFormat, Tensor], tuple[Encoded, Mapping[str, Any]]]


def encode_on_data(
    one: Pass,
    program: Program,
    ctx: PassContext,
    kinds: tuple[str, ...],
    choose: Callable[[Layer, Tensor], GridFormat | str],
    encode: Encode,
    *,
    aim_at_original: bool = False,
) -> PassResult:
    """Encode every selected layer of ``kinds`` for the inputs it gets on calibration data.

    ``choose`` gives a layer's format or the reason to leave it; ``encode`` is given some rows of
    the weight and the second moment of the layer's inputs, which come from layers that are encoded
    already, and may return remarks for the report. Layers that read one value share its moment.
    ``aim_at_original`` lets the original model run beside, and gives ``encode`` the weight that
    makes up for what the encoded layers before it have changed.
    """
    assert ctx.calibration is not None
    forms, skipped = choose_formats(one, program, kinds, choose)
    if not forms:
        return PassResult(changed=False, stats={"layers": 0}, skipped=skipped)
    names = {layer.path: form.name for layer, form in forms.items()}
    route = data_key(one, program, ctx, formats=names)
    known = _known_result(program, ctx, forms, route)
    if known is not None:
        return replace(known, skipped=tuple(skipped))
    stream = Stream(program, ctx.calibration.for_part(program), ctx)
    original = None
    if aim_at_original:
        original = Stream(program, ctx.calibration.for_part(program), ctx)
    encoded: dict[Layer, Encoded] = {}
    weight_error: dict[str, float] = {}
    layer_error: dict[str, float] = {}
    remarks: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    for group, moments in visit_groups(program, stream, input_groups(list(forms)), original):
        # The drift, and one matrix in float64, which is factored in place.
        more = 0 if original is None else original.held_bytes + 12 * len(moments.second) ** 2
        stream.reserve(4 * len(moments.second) ** 2 + more, f"rounding {group.layers[0].path!r}")
        moment, shift = moments.second, correction(moments)
        del moments
        trim_heap()
        for layer in group.layers:
            ctx.progress.step(len(encoded), len(forms), "layers")
            ctx.check_time(f"encoding {layer.path}")
            form, weight = forms[layer], program.weight(layer.weight)
            read = [weight, moment] if shift is None else [weight, moment, shift]
            keys[layer.path] = encoding_key(one, ctx, form, read)
            encoded[layer], said = keep_encoding(
                ctx, keys[layer.path],
                partial(_by_rows, encode, layer, weight, form, moment, shift),
            )  # fmt: skip
            weight_error[layer.path], layer_error[layer.path] = _errors(
                form, weight, encoded[layer], moment
            )
            if len(encoded) < len(forms):  # nothing comes behind the last
                decoded = form.decode(encoded[layer]).to(weight.dtype)
                stream.replace_weight(layer.calls, layer.weight, decoded)
                del decoded
            if said:
                remarks[layer.path] = dict(said)
    for layer, one_encoded in encoded.items():
        forms[layer].place(program, layer, one_encoded)
    stats: dict[str, Any] = {
        "layers": len(encoded),
        "formats": {layer.path: forms[layer].name for layer in encoded},
        "weight_error": weight_error,
        "output_error": layer_error,
        "batches": stream.batches,
        "peak_activation_bytes": stream.peak_bytes,
    }
    if remarks:
        stats["remarks"] = remarks
    if route is not None and ctx.cache is not None:
        ctx.cache.put(_BUCKET, route, {"keys": list(keys.items()), "stats": stats})
    return PassResult(changed=True, stats=stats, skipped=skipped)


def _known_result(
    program: Program, ctx: PassContext, forms: Mapping[Layer, GridFormat],
    route: Mapping[str, Any] | None,
) -> PassResult | None:  # fmt: skip
    """The result of a run on the same program and data, whose encodings are all still kept."""
    known = None if route is None or ctx.cache is None else ctx.cache.get(_BUCKET, route)
    if known is None:
        return None
    encoded: dict[Layer, Encoded] = {}
    paths = {layer.path: layer for layer in forms}
    for path, key in known["keys"]:
        found = find_encoding(ctx, key)
        if found is None or path not in paths:
            return None
        encoded[paths[path]] = found[0]
    for layer, one_encoded in encoded.items():
        forms[layer].place(program, layer, one_encoded)
    return PassResult(changed=True, stats=known["stats"])


def _by_rows(
    encode: Encode, layer: Layer, weight: Tensor, form: GridFormat, moment: Tensor,
    shift: Tensor | None,
) -> tuple[Encoded, Mapping[str, Any]]:  # fmt: skip
    """A weight encoded some rows at a time, which need not know of each other."""
    said: dict[str, Any] = {}

    def pieces() -> Iterator[Encoded]:
        for at in row_pieces(weight, _ROUNDED_TOGETHER):
            rows = weight[at]
            aim = rows if shift is None else (rows.float() + rows.float() @ shift).to(weight.dtype)
            piece, remarks = encode(layer, aim, form, moment)
            said.update(remarks)
            trim_heap()
            yield piece

    return Encoded.join(pieces(), len(weight)), said


def _errors(
    form: GridFormat, weight: Tensor, encoded: Encoded, moment: Tensor
) -> tuple[float, float]:
    """The errors of an encoding and of the layer's output, as shares of the power of either."""
    size = wrong = power = error = 0.0
    for at in row_pieces(weight):
        rows = weight[at].float()
        difference = rows - form.decode(encoded.rows(at)).float()
        size += float(rows.square().sum(dtype=torch.float64))
        wrong += float(difference.square().sum(dtype=torch.float64))
        power += output_error(rows, moment)
        error += output_error(difference, moment)
    return (wrong / size if size > 0 else wrong), (error / power if power > 0 else 0.0)


def grid_for(form: GridFormat, weight: Tensor, moment: Tensor, ranges: str) -> Grid:
    """Scales by a method of that name: "output" weighs errors by the inputs' second moment.

    Inputs that were always zero count a little, so that their weights are not clipped at will.
    """
    if ranges != "output":
        return form.grid(weight, ranges=ranges)
    weigh = moment.clone()
    weigh.diagonal().add_(1e-3 * moment.diagonal().mean().clamp(min=1e-30))
    return form.grid(weight, ranges="mse", importance=weigh)


def choose_formats(
    one: Pass,
    program: Program,
    kinds: tuple[str, ...],
    choose: Callable[[Layer, Tensor], GridFormat | str],
) -> tuple[dict[Layer, GridFormat], list[Skip]]:
    """The format of each selected layer of ``kinds``, and why others are left alone.

    Raises InputError for a weight that holds NaN or infinity.
    """
    forms: dict[Layer, GridFormat] = {}
    skipped: list[Skip] = []
    for layer in find_layers(program):
        if layer.kind not in kinds or not one.selects(layer.path):
            continue
        weight = program.weight(layer.weight)
        require_finite(weight, layer.path, layer.source)
        chosen = choose(layer, weight)
        reason = chosen if isinstance(chosen, str) else chosen.check(layer, weight)
        inputs = [call.args[0] for call in layer.calls]
        if reason is None and any(
            not isinstance(value, fx.Node) or value.op == "get_attr" for value in inputs
        ):
            reason = "its input is a constant"
        if isinstance(chosen, str) or reason:
            skipped.append(Skip(layer.path, str(reason)))
        else:
            forms[layer] = chosen
    return forms, skipped
