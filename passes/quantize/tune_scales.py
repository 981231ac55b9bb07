"""Train the scales of rounded weights together, for the outputs of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mopt.layers import LINEAR, is_returned
from mopt.ops import dequantize_blocks
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
from mopt.program import Program, module_path

_mopt = torch.ops.mopt
_CODES, _SCALES, _ZEROS, _BIAS, _BITS, _COLUMNS = 1, 2, 3, 4, 5, 6
# One in so many batches judges the training and takes no part in it.
_HELD_OUT = 8


@register_pass("tune-scales", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class TuneScales(Pass):
    """Train the scales of rounded weights together, for the outputs of the whole model.

    ## When to use
    Behind any rounding of linear layers to groups of 2, 3 or 4 bits, when a few minutes on a small
    model can be spent. The fewer the bits, the more there is to gain.

    ## Accuracy
    The second phase of EfficientQAT (Chen et al. 2024): codes and zero points stay bit for bit,
    scales are trained by Adam through the whole model. The goal is not the text but the model
    before its first lossy pass: the divergence of its output probabilities (Kullback-Leibler) where
    it returns the results of linear layers, the squared error of its outputs otherwise. No labels
    are needed. One in eight batches is held out; the scales are kept only if they lower the goal
    there. `divergence` in the statistics is the goal on those before and after.

    ## Limits
    Every step runs the model before rounding once and this one forwards and backwards, with all
    activations of one calibration batch in memory. Layers in int8 with ranges found at run time
    pass gradients on as if they did not round; behind static 8-bit values no scale can be trained.

    ## Example
    A scale of 0.031 becomes 0.030 because the layers behind it are better off with it.
    """

    steps: int = option(100, min=1, help="training steps, a calibration batch each")
    rate: float = option(0.004, min=0, max=1, help="learning rate of scales, as a share")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        source = ctx.unrounded.parts().get(program.path) if ctx.unrounded is not None else None
        readers = _scale_readers(program, self)
        skipped: list[Skip] = []
        if readers and any(_is_static(node) for node in program.graph.nodes):
            skipped.append(Skip(program.path or "model", "it computes in static 8-bit values"))
            readers = []
        if source is None or not readers:
            return PassResult(changed=False, stats={"layers": 0}, skipped=skipped)
        batches = list(ctx.calibration.for_part(program))
        student = _Student(program, readers, _gives_logits(program))
        kept, judged = _split(len(batches))
        held_out = [(batches[at], _outputs(source, batches[at])) for at in judged]
        before = student.divergence(held_out)
        optimizer = torch.optim.Adam(student.logarithms.values(), lr=self.rate, betas=(0.9, 0.95))
        random = torch.Generator().manual_seed(ctx.seed)
        order: list[int] = []
        for step in range(self.steps):
            ctx.progress.step(step, self.steps, "training steps")
            ctx.check_time("training scales")
            optimizer.param_groups[0]["lr"] = self.rate * (1 - 0.95 * step / self.steps)
            order = order or torch.randperm(len(kept), generator=random).tolist()
            batch = batches[kept[order.pop()]]
            wanted = _outputs(source, batch)
            with torch.enable_grad():
                loss = student.loss(batch, wanted)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        after = student.divergence(held_out)
        stats: dict[str, Any] = {"layers": 0, "divergence": {"before": before, "after": after}}
        if not after < before:
            skipped.append(Skip(program.path or "model", "training did not help on held-out data"))
            return PassResult(changed=False, stats=stats, skipped=skipped)
        for node, scales in student.scales():
            new = program.add_weight(f"{node.target}_tuned", scales, before=node)
            for user in list(node.users):
                if user.target is _mopt.linear_nbits.default and self.selects(module_path(user)):
                    user.update_arg(_SCALES, new)
            if not node.users:
                program.graph.erase_node(node)
        stats["layers"] = len(readers)
        return PassResult(changed=True, stats=stats, skipped=skipped)


class _Student(fx.Interpreter):
    """Runs a program with trainable scales; what only stores weights decodes them."""

    def __init__(self, program: Program, readers: list[fx.Node], gives_logits: bool) -> None:
        super().__init__(program.graph_module)
        self._program, self._gives_logits = program, gives_logits
        self._first = {node: program.weight(node).float() for node in readers}
        self.logarithms = {
            node: torch.zeros_like(scales).requires_grad_() for node, scales in self._first.items()
        }

    def scales(self) -> Iterator[tuple[fx.Node, Tensor]]:
        """Each reader of scales with what they have become, in the dtype they had."""
        for node, logarithms in self.logarithms.items():
            tuned = self._first[node] * logarithms.detach().exp()
            yield node, tuned.to(self._program.weight(node).dtype)

    def divergence(self, pairs: list[Any]) -> float:
        """The mean loss over pairs of inputs and wanted outputs."""
        with torch.no_grad():
            return sum(float(self.loss(call, wanted)) for call, wanted in pairs) / len(pairs)

    def loss(self, call: Any, wanted: list[Tensor]) -> Tensor:
        """How far the outputs for one batch are from the wanted ones."""
        flat = self._program.flat_inputs(*call)
        given = self.run(*flat, enable_io_processing=False)
        found = _floating(torch.utils._pytree.tree_leaves(given))
        total = torch.zeros(())
        for value, target in zip(found, wanted, strict=True):
            value, target = value.float(), target.float()
            if self._gives_logits:
                total = total + F.kl_div(
                    value.log_softmax(-1).flatten(0, -2), target.log_softmax(-1).flatten(0, -2),
                    reduction="batchmean", log_target=True,
                )  # fmt: skip
            else:
                power = target.square().mean().clamp(min=1e-30)
                total = total + (value - target).square().mean() / power
        return total

    def run_node(self, n: fx.Node) -> Any:
        if n.target is _mopt.linear_nbits.default:
            args, _ = self.fetch_args_kwargs_from_env(n)
            reader = n.args[_SCALES]
            assert isinstance(reader, fx.Node)
            scales = args[_SCALES]
            if reader in self.logarithms:
                scales = self._first[reader] * self.logarithms[reader].exp()
            zeros, bits, columns = args[_ZEROS], args[_BITS], args[_COLUMNS]
            weight = dequantize_blocks(args[_CODES], scales, zeros, bits, columns)
            return F.linear(args[0], weight.to(args[0].dtype), args[_BIAS])
        if n.target is _mopt.linear_dynamic_int8.default:
            x, codes, scales, bias = self.fetch_args_kwargs_from_env(n)[0]
            return F.linear(x, codes.to(x.dtype) * scales[:, None], bias)
        return super().run_node(n)


def _scale_readers(program: Program, one: Pass) -> list[fx.Node]:
    found = [
        node.args[_SCALES] for node in program.graph.nodes
        if node.target is _mopt.linear_nbits.default and one.selects(module_path(node))
        and isinstance(node.args[_SCALES], fx.Node) and node.args[_SCALES].op == "get_attr"
    ]  # fmt: skip
    return list(dict.fromkeys(found))


def _is_static(node: fx.Node) -> bool:
    return node.target is _mopt.quantize.default


def _gives_logits(program: Program) -> bool:
    """Whether everything that the program returns is the result of a linear layer."""
    heads = (*LINEAR, _mopt.linear_nbits.default, _mopt.linear_dynamic_int8.default)
    returned = program.graph.output_node().all_input_nodes
    made = [n for n in program.graph.nodes if n.target in heads and is_returned(n)]
    return len(made) == len(returned) and all(n.meta["val"].dim() > 1 for n in returned)


def _outputs(program: Program, call: Any) -> list[Tensor]:
    args, kwargs = call
    return _floating(program.run_flat(*args, **kwargs))


def _floating(values: list[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _split(count: int) -> tuple[list[int], list[int]]:
    """Batches to train on and batches to judge on; one batch serves as both."""
    judged = [at for at in range(count) if at % _HELD_OUT == _HELD_OUT - 1] or [count - 1]
    return [at for at in range(count) if at not in judged] or judged, judged
