"""use-channels-last: images with the channels of a pixel side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, register_pass
from mopt.program import Program, iter_calls

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv2d.default, aten.conv_transpose2d.input)
# Beside elementwise ones: operators that work in either layout and keep the one they find.
_KEEP_LAYOUT = {
    aten.batch_norm.default, aten.max_pool2d.default, aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default, aten.cat.default, aten.dropout.default,
    aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.mean.dim,
}  # fmt: skip
# Of these the result has no image layout any more.
_ENDS = {aten.mean.dim}


@register_pass("use-channels-last", numerics=Numerics.ROUNDING, tolerance=1e-4)
@dataclass(frozen=True, kw_only=True)
class UseChannelsLast(Pass):
    """Store convolution weights, and compute images, with the channels of a pixel side by side.

    ## When to use
    Before a memory plan for the eager backend: in the plain layout a convolution copies its input,
    weight and result into a layout of its own and back on every run, which takes up to twice the
    memory of input and result and time besides.

    ## Accuracy
    Rounding: the convolution kernels of the other layout sum in another order.

    ## Limits
    Only for the eager backend; other runtimes choose layouts by themselves. Two-dimensional
    convolutions with constant weights. Results are brought back into the plain layout before
    operators that are not known to work in both, and before the outputs.

    ## Example
    `conv2d(x, w)` with `w` of strides (27, 9, 3, 1) gets the same `w` with strides (27, 1, 9, 3).
    """

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Replace weights, and bring images back where the plain layout is needed."""
        calls = list(iter_calls(program, *_CONVOLUTIONS))
        if ctx.backend != "eager":
            reason = f"backend {ctx.backend} chooses layouts by itself"
            return PassResult(changed=False, skipped=[Skip("", reason)] if calls else [])
        skipped: list[Skip] = []
        changed = 0
        images: set[fx.Node] = set()
        for node in program.nodes:
            if node in calls and self._convert(program, node, skipped):
                changed += 1
            convolves = node.target in _CONVOLUTIONS and _is_last(program.constant(node.args[1]))
            passed_on = any(source in images for source in node.all_input_nodes)
            if convolves or (passed_on and _keeps_layout(node)):
                images.add(node)
        if changed:
            restored = _restore(program, images)
            return PassResult(True, {"convolutions": changed, "restored": restored}, skipped)
        return PassResult(changed=False, skipped=skipped)

    def _convert(self, program: Program, node: fx.Node, skipped: list[Skip]) -> bool:
        weight = program.constant(node.args[1])
        source = node.args[1]
        assert isinstance(source, fx.Node)
        if weight is None:
            skipped.append(Skip(node.name, "the weight is computed"))
            return False
        if _is_last(weight):
            return False
        other = weight.contiguous(memory_format=torch.channels_last)
        if other.stride() == weight.stride():
            return False  # one pixel: both layouts are the same
        new = program.add_weight(str(source.target), other, node)
        node.update_arg(1, new)
        return True


def _is_last(weight: Tensor | None) -> bool:
    return weight is not None and weight.is_contiguous(memory_format=torch.channels_last)


def _keeps_layout(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    # What writes to its argument has the layout that is there.
    writes = node.target._schema.is_mutable
    return writes or node.target in _KEEP_LAYOUT or torch.Tag.pointwise in node.target.tags


def _restore(program: Program, images: set[fx.Node]) -> int:
    """Give every reader that may need the plain layout a copy in it; how many copies there are."""
    count = 0
    for image in [node for node in program.nodes if node in images and node.target not in _ENDS]:
        strict = [
            user for user in image.users
            if user not in images and user.target not in _CONVOLUTIONS
            and user.target is not aten.contiguous.default
        ]  # fmt: skip
        if not strict:
            continue
        with program.graph.inserting_after(image):
            plain = program.graph.call_function(aten.contiguous.default, (image,))
        plain.meta.update({k: image.meta[k] for k in ("nn_module_stack", "stack_trace")
                           if k in image.meta})  # fmt: skip
        for user in strict:
            user.replace_input_with(image, plain)
        count += 1
    return count
