"""Fit the layers of a changed program to the outputs they had in the original one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mopt.axes import Array
from mopt.effects import argument
from mopt.layer_rows import can_read_rows, input_rows, input_width, output_rows
from mopt.layers import CONVOLUTIONS, LINEAR
from mopt.pass_base import PassContext
from mopt.program import Program, module_path
from mopt.streaming import Stream

# Of the mean of the moment's diagonal: pulls the fit towards the weights there are.
_RIDGE = 1e-2
# Layers with more inputs per output than this are left: the fit takes their cube in operations.
_MOST_INPUTS = 2304
_MOST_ROWS = 1 << 14
# A layer whose outputs differ by less already computes what it did.
_EXACT = 1e-9


def refit(
    program: Program, original: Program, kept: Mapping[str, Array], ctx: PassContext, *,
    changed: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Replace weights so that layers give the original outputs, as far as their inputs allow.

    One layer after another, on the values that the layers fitted before it give: least squares
    with a pull towards the present weight. ``kept`` has the channels that calls of ``program``
    still write, by node name; ``changed`` names calls that are approximations. Returns the relative
    squared errors of the outputs, before and after.
    """
    assert ctx.calibration is not None
    theirs = {node.name: node for node in original.graph.nodes}
    calls = [node for node in program.graph.nodes if _can_fit(program, node, theirs)]
    behind = _behind_changes(program, {*kept, *changed})
    calls = [call for call in calls if call in behind]
    if not calls:
        return {"layers": 0}
    stream = Stream(program, ctx.calibration.for_part(program), ctx)
    reference = Stream(original, ctx.calibration.for_part(original), ctx)
    fitted: list[tuple[fx.Node, Tensor, Tensor | None]] = []
    errors: dict[str, list[float]] = {}
    for call in calls:
        ctx.progress.step(len(fitted), len(calls), "layers fitted")
        source, twin = call.args[0], theirs[call.name]
        assert isinstance(source, fx.Node)
        stream.advance(call)
        reference.advance(twin.next)
        weight = program.weight(call.args[1])  # type: ignore[arg-type]
        bias_node = argument(call, "bias")
        bias = program.constant(bias_node)
        channels = torch.from_numpy(kept[call.name]) if call.name in kept else None
        inputs, outputs = _rows(call, weight, stream.values(source), reference.values(twin))
        if channels is not None:
            outputs = outputs[:, channels]
        found = _fit(inputs, outputs, weight.flatten(1), bias)
        if found is None:
            continue
        fresh, offset, before, after = found
        fresh = fresh.reshape(weight.shape).to(weight.dtype)
        stream.replace_weight([call], call.args[1], fresh)  # type: ignore[arg-type]
        if bias is not None and offset is not None:
            offset = offset.to(bias.dtype)
            stream.replace_weight([call], bias_node, offset)
        fitted.append((call, fresh, offset))
        errors[module_path(call) or call.name] = [before, after]
    for call, fresh, offset in fitted:
        _store(program, call, 1, fresh)
        if offset is not None:
            _store(program, call, 2, offset)
    program.refresh()
    return {"layers": len(fitted), "output_error": errors}


def _store(program: Program, call: fx.Node, at: int, tensor: Tensor) -> None:
    old = call.args[at]
    assert isinstance(old, fx.Node)
    call.update_arg(at, program.add_weight(f"{old.target}_refit", tensor, call))
    if not old.users:
        program.graph.erase_node(old)


def _can_fit(program: Program, node: fx.Node, theirs: Mapping[str, fx.Node]) -> bool:
    """Plain layers with a weight of their own, that the original calls too."""
    layers = (*LINEAR, *CONVOLUTIONS)
    if node.op != "call_function" or node.target not in layers or can_read_rows(node):
        return False
    weight = node.args[1]
    if program.constant(weight) is None or node.name not in theirs:
        return False
    same = [reader for reader in program.graph.nodes
            if reader.op == "get_attr" and reader.target == weight.target]  # type: ignore[union-attr]  # fmt: skip
    if sum(len(reader.users) for reader in same) > 1:
        return False
    bias = argument(node, "bias")
    if bias is not None and (program.constant(bias) is None or len(node.args) < 3):
        return False
    return input_width(program.weight(weight)) <= _MOST_INPUTS  # type: ignore[arg-type]


def _behind_changes(program: Program, changed: Collection[str]) -> set[fx.Node]:
    """The calls of those names, and all that depends on them."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if any(source in found for source in node.all_input_nodes) or node.name in changed:
            found.add(node)
    return found


def _rows(
    call: fx.Node, weight: Tensor, values: list[Tensor], wanted: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Rows of inputs and of outputs of a layer over all batches, float32."""
    most = max(_MOST_ROWS // len(values), 1)
    inputs = [input_rows(call, weight, value, most).detach().float() for value in values]
    outputs = [output_rows(call, value, most).detach().float() for value in wanted]
    return torch.cat(inputs), torch.cat(outputs)


def _fit(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, float, float] | None:
    """Least squares for y = W x + b near ``weight``; None where it does not help."""
    # Sums over rows in float32 are exact enough beside the ridge; solving is not.
    w = weight.float()
    old = x @ w.t() + (0 if bias is None else bias.float())
    shift_x = x.mean(0) if bias is not None else torch.zeros_like(x[0])
    shift_y = y.mean(0) if bias is not None else torch.zeros_like(y[0])
    xc, yc = x - shift_x, y - shift_y
    moment = (xc.t() @ xc).double() / len(x)
    # Few rows determine few directions: the fewer there are, the stronger the pull.
    ridge = _RIDGE * (1 + x.shape[1] / len(x)) * moment.diagonal().mean().clamp(min=1e-30)
    cross = (yc.t() @ xc).double() / len(x) + ridge * w.double()
    moment.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(moment)
    if bool(failed):
        return None
    fresh = torch.cholesky_solve(cross.t(), factor).t().float()
    offset = shift_y - fresh @ shift_x if bias is not None else None
    new = x @ fresh.t() + (0 if offset is None else offset)
    power = float(y.square().sum()) or 1.0
    before, after = (float((one - y).square().sum()) / power for one in (old, new))
    return (fresh, offset, before, after) if after < before > _EXACT else None
