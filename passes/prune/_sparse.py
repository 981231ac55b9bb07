"""What the passes share that set single weights to zero, one layer after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mopt.errors import UsageError
from mopt.layer_rows import can_read_rows, input_rows, input_width
from mopt.layers import Layer, find_layers, is_returned
from mopt.pass_base import Pass, PassContext, PassResult, Skip, option
from mopt.passes.prune._masks import Pattern, size_only
from mopt.program import Program
from mopt.second_order import output_error
from mopt.streaming import Stream

# A second moment of more inputs than this is not formed.
_MOST_INPUTS = 4608
_MOST_ROWS = 1 << 16

# The weight as (outputs, inputs) and the second moment of its inputs, or None without data.
Sparsify = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class SparsePass(Pass):
    """The options of passes that set single weights to zero, and what all of them say."""

    ratio: float = option(0.5, min=0, max=1, help="share of zeros, where pattern is unstructured")
    pattern: str = option("unstructured", help="unstructured, or n:m such as 2:4")
    min_size: int = option(1024, min=0, help="leave layers with fewer weights alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        Pattern.parse(self.pass_name, self.pattern, self.ratio)

    def notice(self, backend: str) -> str | None:
        return size_only(backend)

    def wanted(self) -> Pattern:
        """The pattern asked for. Raises UsageError where it would leave nothing."""
        pattern = Pattern.parse(self.pass_name, self.pattern, self.ratio)
        if pattern.ratio == 1:
            raise UsageError(
                f"{self.pass_name}: ratio 1 would empty every layer",
                code="empties-layer",
                hint="give a ratio below 1",
            )
        return pattern


def sparse_layers(
    one: Pass, program: Program, pattern: Pattern, min_size: int, *, with_data: bool
) -> tuple[list[Layer], list[Skip]]:
    """The layers to prune, and the reason for each one that stays."""
    layers, skipped = [], []
    for layer in find_layers(program):
        if layer.kind == "embedding" or not one.selects(layer.path):
            continue
        weight = program.weight(layer.weight)
        reason = pattern.misfit(input_width(weight))
        if weight.numel() < min_size:
            reason = f"it has fewer than min_size {min_size} weights"
        elif "transpose" in str(layer.calls[0].target):
            reason = "transposed convolutions are left alone"
        elif any(is_returned(call) for call in layer.calls):
            reason = "it is the model's head, whose errors nothing smooths"
        elif with_data and reason is None:
            reason = next((why for call in layer.calls if (why := can_read_rows(call))), None)
            if input_width(weight) > _MOST_INPUTS:
                reason = f"each output reads {input_width(weight)} inputs, at most {_MOST_INPUTS}"
        if reason is None:
            layers.append(layer)
        else:
            skipped.append(Skip(layer.path, reason))
    return layers, skipped


def sparsify_layers(
    one: Pass, program: Program, ctx: PassContext, layers: list[Layer], skipped: list[Skip],
    sparsify: Sparsify, *, with_data: bool,
) -> PassResult:  # fmt: skip
    """Replace the layers' weights, each on what the pruned layers before it give."""
    found: dict[Layer, Tensor] = {}
    errors: dict[str, float] = {}
    stream = None
    if with_data and layers:
        assert ctx.calibration is not None
        stream = Stream(program, ctx.calibration.for_part(program), ctx)
    last = sorted(layers, key=lambda layer: _place(program, layer.calls[-1]))
    for layer in last:
        ctx.progress.step(len(found), len(layers), "layers")
        ctx.check_time(f"pruning {layer.path}")
        weight = program.weight(layer.weight)
        flat = weight.flatten(1)
        moment = None
        if stream is not None:
            stream.advance(layer.calls[-1])
            moment = _moment(stream, layer.calls[-1], weight)
        fresh = sparsify(flat, moment)
        found[layer] = fresh.reshape(weight.shape).to(weight.dtype)
        if moment is not None and stream is not None:
            size = output_error(flat, moment)
            errors[layer.path] = output_error(flat - fresh, moment) / size if size else 0.0
            stream.replace_weight(layer.calls, layer.weight, found[layer])
    changed = False
    for layer, fresh in found.items():
        if torch.equal(program.weight(layer.weight), fresh):
            skipped.append(Skip(layer.path, "it has those zeros already"))
            continue
        changed = True
        stored = program.add_weight(f"{layer.weight.target}_sparse", fresh, layer.calls[0])
        for call in layer.calls:
            call.update_arg(1, stored)
    for node in program.nodes:
        if node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)
    zeros = sum(int((tensor == 0).sum()) for tensor in found.values())
    total = sum(tensor.numel() for tensor in found.values())
    stats: dict[str, Any] = {
        "layers": len(found),
        "zeros": zeros / total if total else 0.0,
        "zeros_of": {
            layer.path: float((fresh == 0).double().mean()) for layer, fresh in found.items()
        },
        "gain_class": "size",
    }
    if errors:
        stats["output_error"] = errors
    return PassResult(changed=changed, stats=stats, skipped=skipped)


def _place(program: Program, node: fx.Node) -> int:
    return list(program.graph.nodes).index(node)


def _moment(stream: Stream, call: fx.Node, weight: Tensor) -> Tensor:
    source = call.args[0]
    assert isinstance(source, fx.Node)
    values = stream.values(source)
    most = max(_MOST_ROWS // len(values), 1)
    width = input_width(weight)
    total = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
    rows = 0
    for value in values:
        part = input_rows(call, weight, value, most).detach().float()
        total += part.t() @ part
        rows += len(part)
    return total / max(rows, 1)
