"""Train a program's weights so that it does what the program it was made from does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mopt.calibration import Call
from mopt.layers import CONVOLUTIONS, LINEAR
from mopt.pass_base import PassContext
from mopt.program import Program
from mopt.trainable import Trainable

# Share of the steps over which the learning rate rises.
_WARM_UP = 0.05
_LARGEST_NORM = 1.0
# Weights with more zeros than this were pruned: the zeros stay.
_SPARSE = 0.05


@dataclass(frozen=True)
class Adapter:
    """A weight in training: all of it, or a low-rank change of it (``up @ down``, LoRA)."""

    start: Tensor
    mask: Tensor | None
    free: tuple[Tensor, ...]

    @staticmethod
    def of(weight: Tensor, rank: int, generator: torch.Generator) -> Adapter:
        """A matrix gets a low-rank change where ``rank`` is not 0, all else is trained whole."""
        start = weight.detach().float()
        zero = start == 0
        mask = ~zero if start.dim() > 1 and float(zero.double().mean()) > _SPARSE else None
        if rank == 0 or start.dim() != 2 or min(start.shape) <= rank:
            return Adapter(start, mask, (start.clone().requires_grad_(),))
        down = torch.randn(rank, start.shape[1], generator=generator) / start.shape[1] ** 0.5
        up = torch.zeros(start.shape[0], rank)
        return Adapter(start, mask, (down.requires_grad_(), up.requires_grad_()))

    def value(self) -> Tensor:
        """The weight as it is now; zeros of a pruned weight are still there."""
        if len(self.free) == 1:
            return self.free[0] if self.mask is None else self.free[0] * self.mask
        change = self.free[1] @ self.free[0]
        return self.start + (change if self.mask is None else change * self.mask)


def find_teacher(program: Program, ctx: PassContext, what: str) -> Program | str:
    """The program before the first lossy pass, or why there is nothing to learn from it.

    ``what`` is what should come before rounding, such as "train".
    """
    teacher = ctx.unrounded.parts().get(program.path) if ctx.unrounded is not None else None
    if teacher is None or teacher.fingerprint() == program.fingerprint():
        return "nothing was lost so far"
    if any("mopt." in str(node.target) for node in program.graph.nodes):
        return f"its weights are rounded already: {what} before that"
    return teacher


def trainable_readers(program: Program) -> list[fx.Node]:
    """The weights and biases of linear layers and convolutions, each stored tensor once."""
    found: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        if node.target in (*LINEAR, *CONVOLUTIONS):
            for argument in node.args[1:3]:
                if isinstance(argument, fx.Node) and argument.op == "get_attr":
                    found.setdefault(str(argument.target), argument)
    return list(found.values())


def common_values(program: Program, teacher: Program, most: int) -> list[str]:
    """Names of layer calls whose values have one shape in both programs, evenly picked."""
    theirs = {node.name: node.meta["val"].shape for node in teacher.graph.nodes
              if node.target in (*LINEAR, *CONVOLUTIONS)}  # fmt: skip
    names = [
        node.name
        for node in program.graph.nodes
        if node.name in theirs and tuple(map(str, node.meta["val"].shape))
        == tuple(map(str, theirs[node.name]))
    ]  # fmt: skip
    return names[:: -(-len(names) // most)] if names and most else []


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor], temperature: float) -> Tensor:
    """How far outputs are from the teacher's: per row, T^2 KL of classes, else squared error.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; T^2 keeps the size of the
    gradients.
    """
    total = torch.zeros(())
    for mine, wanted in zip(ours, theirs, strict=True):
        if mine.dim() and mine.shape[-1] > 1:
            log = F.log_softmax(mine.reshape(-1, mine.shape[-1]) / temperature, 1)
            goal = F.log_softmax(wanted.reshape(-1, wanted.shape[-1]) / temperature, 1)
            kl = F.kl_div(log, goal, reduction="batchmean", log_target=True)
            total = total + temperature**2 * kl
        else:
            total = total + relative(mine, wanted)
    return total


def relative(mine: Tensor, wanted: Tensor) -> Tensor:
    """The squared difference, relative to the power of what is wanted."""
    return (mine - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)


@dataclass
class Distillation:
    """One training; ``teacher`` is run beside on every batch."""

    program: Program
    teacher: Program
    watched: list[str]
    temperature: float
    hidden: float

    def loss(self, runner: Trainable, guide: Trainable, call: Call) -> Tensor:
        """The distance of outputs, and a share of that of common values inside."""
        with torch.no_grad():
            wanted = guide.outputs(*call)
        total = distance(runner.outputs(*call), wanted, self.temperature)
        if self.watched:
            inside = [relative(runner.seen[n], guide.seen[n]) for n in self.watched]
            total = total + self.hidden * torch.stack(inside).mean()
        return total

    def train(
        self, adapters: dict[str, Adapter], batches: Sequence[Call], *, steps: int,
        seconds: float, learning_rate: float, generator: torch.Generator,
        progress: Callable[[int], None],
    ) -> int:  # fmt: skip
        """Adam for so many steps, or until the time is up; the number of steps taken.

        The batches come in a seeded order. Their order and the learning rates depend on nothing but
        the seed and the steps, unless time ends it.
        """
        free = [tensor for adapter in adapters.values() for tensor in adapter.free]
        optimizer = torch.optim.Adam(free, lr=learning_rate)
        guide = Trainable(self.teacher, {}, self.watched)
        started, order, done = time.monotonic(), [0][:0], 0
        while done < steps:
            used = (time.monotonic() - started) / seconds
            if used >= 1:
                break
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            past = max(done / steps, used)
            rise = min(1.0, (done + 1) / max(1, _WARM_UP * steps))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rise * 0.5 * (1 + math.cos(math.pi * past))
            weights = {path: adapter.value() for path, adapter in adapters.items()}
            runner = Trainable(self.program, weights, self.watched)
            optimizer.zero_grad()
            self.loss(runner, guide, batches[order.pop()]).backward()
            torch.nn.utils.clip_grad_norm_(free, _LARGEST_NORM)
            optimizer.step()
            done += 1
            progress(done)
        return done

    def judge(self, weights: dict[str, Tensor], batches: Sequence[Call]) -> float:
        """The mean distance of the outputs alone on batches."""
        runner, guide = Trainable(self.program, weights), Trainable(self.teacher, {})
        with torch.no_grad():
            found = [
                float(distance(runner.outputs(*call), guide.outputs(*call), 1.0))
                for call in batches
            ]
        return sum(found) / len(found)
