"""Run a program so that gradients reach its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mopt.pass_base import PassContext
from mopt.program import Program


class Trainable(fx.Interpreter):
    """A program whose weights are read from ``weights``, by attribute path, where they are given.

    ``watch`` names nodes whose values of the last run are kept in ``seen``.
    """

    def __init__(
        self, program: Program, weights: Mapping[str, Tensor], watch: Iterable[str] = ()
    ) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.program = program
        self.weights = weights
        self.watch = frozenset(watch)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As the interpreter does, with other weights."""
        if n.op == "get_attr" and n.target in self.weights:
            return self.weights[str(n.target)]
        value = super().run_node(n)
        if n.name in self.watch:
            self.seen[n.name] = value
        return value

    def outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The floating-point outputs of a run that records gradients."""
        flat = self.program.flat_inputs(args, kwargs)
        found = self.run(*flat, enable_io_processing=False)
        return [leaf for leaf in pytree.tree_leaves(found)
                if isinstance(leaf, Tensor) and leaf.is_floating_point()]  # fmt: skip


def sampled_loss(outputs: list[Tensor], generator: torch.Generator) -> Tensor:
    """A loss whose gradients' squares have the Fisher information for their mean; no labels needed.

    Rows of outputs are taken for logits, of which a class is drawn; single numbers for the mean of
    a normal distribution, of which a value is drawn.
    """
    total = torch.zeros(())
    for output in outputs:
        rows = output.reshape(-1, output.shape[-1] if output.dim() else 1)
        if rows.shape[1] > 1:
            drawn = torch.multinomial(rows.detach().softmax(1), 1, generator=generator)[:, 0]
            total = total + torch.nn.functional.cross_entropy(rows, drawn)
        else:
            noise = torch.randn(rows.shape, generator=generator)
            total = total + (rows * noise).mean()
    return total


def batch_gradients(
    program: Program, ctx: PassContext, readers: Iterable[fx.Node]
) -> Iterable[dict[str, Tensor]]:
    """For every calibration batch the gradients of the sampled loss, by attribute path."""
    assert ctx.calibration is not None
    weights = {
        str(reader.target): program.weight(reader).clone().requires_grad_() for reader in readers
    }
    runner = Trainable(program, weights)
    generator = torch.Generator().manual_seed(ctx.seed)
    calibration = ctx.calibration.for_part(program)
    for index, (args, kwargs) in enumerate(calibration):
        ctx.check_time("computing gradients")
        ctx.progress.step(index, max(calibration.expected_batches, index + 1), "gradient batches")
        with torch.enable_grad():
            loss = sampled_loss(runner.outputs(args, kwargs), generator)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        yield {
            path: torch.zeros_like(weight) if gradient is None else gradient
            for (path, weight), gradient in zip(weights.items(), found, strict=True)
        }


def squared_gradients(
    program: Program, ctx: PassContext, readers: Iterable[fx.Node]
) -> dict[str, Tensor]:
    """The mean over batches of the squared gradients of those weights, by attribute path."""
    total: dict[str, Tensor] = {}
    count = 0
    for gradients in batch_gradients(program, ctx, list(readers)):
        count += 1
        for path, gradient in gradients.items():
            total[path] = total.get(path, torch.zeros_like(gradient)) + gradient.square()
    return {path: value / max(count, 1) for path, value in total.items()}
