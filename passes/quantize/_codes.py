"""Putting 8-bit codes into a graph: biases in 32 bits, a pair of operators per edge and reader."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mopt.formats import Encoded, Grid
from mopt.formats.base import argument, shared_weight
from mopt.formats.int_rows import Int8Qdq
from mopt.layers import LINEAR, Layer
from mopt.passes.quantize._edges import Edges, edge_of, upper_limit
from mopt.program import Program

_quantize = torch.ops.mopt.quantize.default
_dequantize = torch.ops.mopt.dequantize.default
_BIAS_LIMIT = 2**31 - 256  # the largest float32 below the end of int32, with some room


def fit_bias(
    program: Program,
    layer: Layer,
    encoded: Encoded,
    format_: Int8Qdq,
    edges: Edges,
    grids: dict[fx.Node, Grid],
) -> Encoded:
    """The encoding with wider scales for channels whose bias would not fit into 32 bits.

    Such a bias is so much larger than the weights that what rounding them costs does not show.
    """
    scales = encoded.tensors["scales"]
    wider = scales
    for call in layer.calls:
        bias = program.constant(argument(call, 2, "bias"))
        if bias is not None:
            step = grids[edges.source[call.args[0]]].scales
            wider = torch.maximum(wider, bias.abs() / (step * _BIAS_LIMIT))
    if torch.equal(wider, scales):
        return encoded
    return format_.encode(program.weight(layer.weight), grid=Grid(wider.unsqueeze(1)))


def quantize_bias(program: Program, call: fx.Node, encoded: Encoded, grid: Grid) -> None:
    """Put the int32 bias with scale (input scale * weight scale) in place of the float one.

    Linears on more than two dimensions keep theirs: there it is added after the integer product.
    """
    reader = argument(call, 2, "bias")
    bias = program.constant(reader)
    if bias is None or (call.target in LINEAR and call.args[0].meta["val"].dim() != 2):
        return
    scales = grid.scales * encoded.tensors["scales"]
    codes = torch.round(bias.double() / scales.double()).to(torch.int32)
    nodes = [
        shared_weight(program, f"{reader.target}_{name}", tensor, call)
        for name, tensor in (
            ("codes", codes), ("scales", scales), ("zero_points", torch.zeros_like(codes))
        )
    ]  # fmt: skip
    wide = program.insert_call(_dequantize, (*nodes, 0), like=call)
    call.replace_input_with(reader, wide)
    if not reader.users:
        program.graph.erase_node(reader)


def insert_codes(
    program: Program,
    layers: set[fx.Node],
    edges: Edges,
    grids: dict[fx.Node, Grid],
    dtype: torch.dtype,
) -> int:
    """Quantize each edge once and dequantize it before each reader; the number of folded ReLUs."""
    last_input = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
    scalars: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    folded = 0
    for edge, source in edges.source.items():
        users = list(edge.users)
        chosen = [u for u in users if (u in layers and u.args[0] is edge)
                  or edges.is_integer_reader(u) or edge in edges.native]  # fmt: skip
        after = last_input if edge.op == "placeholder" else edge
        if source is edge:
            scalars[edge] = _store_scalars(program, edge, grids[edge], after)
            after = scalars[edge][-1]
        parameters = scalars[source]
        codes = _call_after(program, _quantize, (edge, *parameters, 0), after, edge)
        for user in chosen:
            back = program.insert_call(_dequantize, (codes, *parameters, 0), like=user)
            back.meta.update({k: v for k, v in edge.meta.items() if k != "val"})
            user.replace_input_with(edge, back)
        folded += _fold_activation(program, edge, codes, grids[source], dtype)
    return folded


def _store_scalars(
    program: Program, edge: fx.Node, grid: Grid, after: fx.Node
) -> tuple[fx.Node, fx.Node]:
    zeros = grid.zero_points
    assert isinstance(zeros, Tensor)
    before = after.next
    return (
        program.add_weight(f"{edge.name}_scale", grid.scales, before),
        program.add_weight(f"{edge.name}_zero_point", zeros, before),
    )


def _call_after(
    program: Program, target: Any, args: tuple[Any, ...], after: fx.Node, like: fx.Node
) -> fx.Node:
    with program.graph.inserting_after(after):
        node = program.graph.call_function(target, args)
    node.meta.update({k: v for k, v in like.meta.items() if k != "val"})
    return node


def _fold_activation(
    program: Program, edge: fx.Node, codes: fx.Node, grid: Grid, dtype: torch.dtype
) -> int:
    """Remove a ReLU or clip that saturation to the code range already does."""
    if edge.op != "call_function" or len(edge.users) != 1:
        return 0
    before = edge.args[0] if edge.args else None
    if not isinstance(before, fx.Node) or edge_of(before) is not edge:
        return 0
    limit, limits = upper_limit(edge), torch.iinfo(dtype)
    zeros = grid.zero_points
    assert limit is not None and isinstance(zeros, Tensor)
    zero = int(zeros)
    if zero != limits.min or round(min(limit / float(grid.scales), 1e6)) + zero < limits.max:
        return 0
    codes.replace_input_with(edge, before)
    program.graph.erase_node(edge)
    return 1
