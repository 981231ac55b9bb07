"""Train what is left of a model to do what the whole one did."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

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
from mopt.passes.prune._distill import (
    Adapter,
    Distillation,
    common_values,
    find_teacher,
    trainable_readers,
)
from mopt.program import Program


@register_pass("recover-quality", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class RecoverQuality(Pass):
    """Train a compressed model on the calibration data to do what the original one does.

    ## When to use
    Behind passes that remove channels, ranks or single weights, before weights are rounded. Some
    minutes on the data at hand win back much of what was lost; no labels are needed.

    ## Accuracy
    Distillation: the outputs, and layers inside that have kept their shape, are drawn towards those
    of the program before the first lossy pass. An eighth of the batches is held back; the training
    is kept only if the outputs have come nearer on them. Zeros of pruned weights stay zero.

    ## Limits
    Float weights of linear layers and convolutions are trained, the rest stays. It ends after
    `steps` steps or `minutes`, whatever comes first: with `minutes` large enough, the result
    depends on the seed alone. `rank` trains low-rank changes of matrices that are added to them in
    the end (LoRA), which takes less memory and moves less.

    ## Example
    A language model without a quarter of its neurons and heads comes back to a few percent.
    """

    minutes: float = option(2.0, min=0.001, help="longest time to train")
    steps: int = option(400, min=1, help="batches to train on, most")
    learning_rate: float = option(3e-4, min=0, help="largest step of Adam")
    rank: int = option(0, min=0, help="rank of changes to matrices (LoRA); 0: whole matrices")
    temperature: float = option(1.0, min=0.1, help="softens the distributions that are compared")
    hidden: float = option(0.5, min=0, help="weight of the values inside, 0: outputs only")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        if ctx.calibration is None:
            return NEEDS_DATA
        return None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        assert ctx.calibration is not None
        teacher = find_teacher(program, ctx, "train")
        if isinstance(teacher, str):
            return self._left(teacher)
        readers = trainable_readers(program)
        batches = list(ctx.calibration.for_part(program))
        if len(batches) < 2 or not readers:
            return self._left("it takes two batches and a layer to train")
        held = max(1, len(batches) // 8)
        every = len(batches) // held
        judged = batches[::every][:held]
        taught = [batch for at, batch in enumerate(batches) if at % every or at // every >= held]
        generator = torch.Generator().manual_seed(ctx.seed)
        adapters = {
            str(node.target): Adapter.of(program.weight(node), self.rank, generator)
            for node in readers
        }
        watched = common_values(program, teacher, 16 if self.hidden else 0)
        work = Distillation(program, teacher, watched, self.temperature, self.hidden)
        seconds = 60 * self.minutes
        if ctx.deadline is not None:
            seconds = min(seconds, max(ctx.deadline - time.monotonic(), 0.0))
        before = work.judge({}, judged)
        with torch.enable_grad():
            steps = work.train(
                adapters, taught, steps=self.steps, seconds=max(seconds, 1e-9),
                learning_rate=self.learning_rate, generator=generator,
                progress=lambda done: ctx.progress.step(done, self.steps, "training steps"),
            )  # fmt: skip
        with torch.no_grad():
            trained = {path: adapter.value().detach() for path, adapter in adapters.items()}
        after = work.judge(trained, judged)
        stats: dict[str, Any] = {"steps": steps, "distance": {"before": before, "after": after}}
        if not after < before:
            left = self._left("training did not bring the outputs nearer on batches held back")
            return PassResult(changed=False, stats=stats, skipped=left.skipped)
        for node in readers:
            kind = program.weight(node).dtype
            stored = program.add_weight(
                f"{node.target}_trained", trained[str(node.target)].to(kind), node
            )
            path = str(node.target)
            for reader in program.nodes:
                if reader.op == "get_attr" and str(reader.target) == path and reader is not stored:
                    with program.graph.inserting_before(reader):
                        same = program.graph.get_attr(str(stored.target))
                    same.meta["val"] = stored.meta["val"]
                    reader.replace_all_uses_with(same)
                    program.graph.erase_node(reader)
            if not stored.users:
                program.graph.erase_node(stored)
        return PassResult(changed=True, stats=stats)

    @staticmethod
    def _left(reason: str) -> PassResult:
        return PassResult(changed=False, stats={"steps": 0}, skipped=[Skip("", reason)])
