"""Round weights with zero points that are fitted to most weights, not to the outliers (HQQ)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopt.formats import Encoded, Grid
from mopt.formats.base import require_finite, row_pieces, shared_weight
from mopt.formats.int_blocks import IntBlocks
from mopt.layers import Layer, find_layers
from mopt.machine import trim_heap
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, option, register_pass
from mopt.passes.quantize._weights import is_small, kernel_notice
from mopt.program import Program

_aten = torch.ops.aten
_ROUNDS = 20
_POWER = 0.7
_FIRST_BETA, _BETA_GROWTH = 10.0, 1.01


@register_pass("quantize-hqq", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class QuantizeHqq(Pass):
    """Round weights with zero points that are fitted to most weights, not to the outliers.

    ## When to use
    For 2- to 4-bit weights without any data, where a few large weights share groups with many
    small ones.

    ## Accuracy
    HQQ (Badri and Shaji 2023): scales from the smallest and largest weight of a group; the zero
    point, a float, is moved by half-quadratic steps to lower the sum of |error|^0.7, and the best
    one found is kept, so the mean magnitude of the errors never exceeds that of rounding to
    nearest. The float zero point is exact: its rounded part goes to the kernel, the rest becomes
    an offset per group, times the sum of the group's inputs.

    ## Limits
    Linear layers whose in_features are a multiple of `group`. The offsets take 32 bits per group,
    half a bit per weight in groups of 64, and a small product beside the kernel. 3 bits are stored
    in 4.

    ## Example
    `(q - 7.3) * s` becomes `(q - 7) * s`, and -0.3 s times the sum of the group's inputs is added.
    """

    bits: int = option(4, choices=(2, 3, 4), help="bits per weight")
    group: int = option(64, choices=(16, 32, 64, 128), help="weights that share a scale")
    activations: str = option(
        "int8", choices=("int8", "float"), help="whether a kernel may round the input to 8 bits"
    )
    min_size: int = option(4096, min=0, help="leave layers with fewer weights alone")

    def notice(self, backend: str) -> str | None:
        return kernel_notice(self.form, backend)

    @property
    def form(self) -> IntBlocks:
        """The format that the options describe."""
        return IntBlocks(self.bits, self.group, True, self.activations)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        form = self.form
        skipped: list[Skip] = []
        formats: dict[str, str] = {}
        error: dict[str, float] = {}
        layers = [layer for layer in find_layers(program) if self.selects(layer.path)]
        for index, layer in enumerate(layers):
            ctx.progress.step(index, len(layers), "layers")
            ctx.check_time(f"encoding {layer.path}")
            weight = program.weight(layer.weight)
            require_finite(weight, layer.path, layer.source)
            reason = self._reason(form, layer, weight)
            if reason:
                skipped.append(Skip(layer.path, reason))
                continue
            encoded, offsets, error[layer.path] = self._encode(form, weight, ctx)
            formats[layer.path] = form.name
            _add_offsets(program, layer, offsets, self.group)
            form.place(program, layer, encoded)
            del weight, encoded
            trim_heap()
        stats: dict[str, Any] = {
            "layers": len(formats), "formats": formats, "weight_error": error,
        }  # fmt: skip
        return PassResult(changed=bool(formats), stats=stats, skipped=skipped)

    def _encode(
        self, form: IntBlocks, weight: Tensor, ctx: PassContext
    ) -> tuple[Encoded, Tensor, float]:
        """The codes, the offsets (rows, groups), and the error as a share of the weight's power."""
        offsets = torch.empty(len(weight), weight.shape[1] // self.group, device=weight.device)
        total = wrong = 0.0

        def pieces() -> Iterator[Encoded]:
            nonlocal total, wrong
            for at in row_pieces(weight):
                ctx.check_time("fitting zero points")
                grid, offsets[at] = fit_zero_points(weight[at], self.group, self.bits)
                spread = offsets[at].repeat_interleave(self.group, dim=1)
                piece = form.encode(weight[at] - spread, grid=grid)
                difference = form.decode(piece).add_(spread).sub_(weight[at])
                total += float(weight[at].square().sum(dtype=torch.float64))
                wrong += float(difference.square().sum(dtype=torch.float64))
                yield piece

        encoded = Encoded.join(pieces(), len(weight))
        return encoded, offsets, wrong / total if total > 0 else wrong

    def _reason(self, form: IntBlocks, layer: Layer, weight: Tensor) -> str | None:
        if layer.kind != "linear":
            return f"only linear layers have a kernel for weights in groups, not {layer.kind}s"
        if weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            return f"the weight is {kind}, the offsets need float32: call model.float()"
        if weight.shape[1] % self.group:
            return f"in_features {weight.shape[1]} is not a multiple of group {self.group}"
        return is_small(layer, self.min_size) or form.check(layer, weight)


def fit_zero_points(weight: Tensor, group: int, bits: int) -> tuple[Grid, Tensor]:
    """The grid with rounded zero points, and the offsets (rows, groups) that make them exact.

    A weight is (code - zero point) * scale + offset.
    """
    x = weight.double().unflatten(1, (-1, group))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    most = 2**bits - 1
    scale = (high - low) / most
    # A constant group is its own zero point; the scale only has to be finite.
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))
    # A rounded zero point makes zero exact, which is much where most weights are close to it.
    best = torch.round(-low / scale)
    _, error = _codes_and_error(x, scale, best, most)
    zero = -low / scale
    beta = _FIRST_BETA
    for _ in range(_ROUNDS):
        codes, tried = _codes_and_error(x, scale, zero, most)
        best = torch.where(tried < error, zero, best)
        error = torch.minimum(tried, error)
        rest = _shrink(x - (codes - zero) * scale, beta)
        zero = (codes - (x - rest) / scale).mean(-1, keepdim=True)
        beta *= _BETA_GROWTH
    whole = torch.round(best).clamp(0, most)
    offsets = ((whole - best) * scale).squeeze(-1)
    return Grid(scale.squeeze(-1).float(), whole.squeeze(-1).float()), offsets.float()


def _codes_and_error(x: Tensor, scale: Tensor, zero: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Codes (rows, groups, group) and the mean magnitude of each group's errors."""
    codes = torch.round(x / scale + zero).clamp(0, most)
    return codes, (x - (codes - zero) * scale).abs().mean(-1, keepdim=True)


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The generalized soft threshold of the |error|^0.7 norm."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-12).pow(_POWER - 1) / beta).clamp(min=0)


def _add_offsets(program: Program, layer: Layer, offsets: Tensor, group: int) -> None:
    """Add each group's offset times the sum of its inputs to the result of every call."""
    path = f"{layer.weight.target}_offsets"
    for call in layer.calls:
        stored = shared_weight(program, path, offsets, call)
        split = program.insert_call(
            _aten.unflatten.int, (call.args[0], -1, [offsets.shape[1], group]), like=call
        )
        sums = program.insert_call(_aten.sum.dim_IntList, (split, [-1]), like=call)
        more = program.insert_call(_aten.linear.default, (sums, stored), like=call)
        with program.graph.inserting_after(call):
            total = program.graph.call_function(_aten.add.Tensor, (call, more))
        total.meta.update(call.meta)
        call.replace_all_uses_with(total, delete_user_cb=lambda user, own=total: user is not own)
