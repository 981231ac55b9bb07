"""One training step on several devices: what is sharded, when weights are given back, what repeats.

Stages are ZeRO's (Rajbhandari et al., SC 2020): 0 copies everything to every device; 2 shards
gradients and optimizer state and keeps gathered weights from forward to backward; 3 shards weights
too and gathers them for each block, twice a step. For each stage the step of one device is planned
within what its memory leaves; the stage with the shortest estimated step is taken. The script that
is written sets this up with PyTorch's FSDP2 (or DDP) and one ``mopt`` backend for each block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mopt.device import DeviceProfile
from mopt.errors import BudgetNotMet, InputError
from mopt.streamed_backward import repeated_blocks
from mopt.training import GraphPlan, TrainingOptions, plain_peak
from mopt.training_plan import plan_training

STAGES = (0, 2, 3)
# Bytes a second each way between two devices of a node, from data sheets (NVLink).
_NVLINK = {"a100": 300e9, "h100": 450e9, "h200": 450e9}
# Two blocks' weights are gathered at once: the current one's and the next one's.
_GATHERED = 2


@dataclass(frozen=True)
class Candidate:
    """A stage with its estimates: bytes on each device, seconds of a step, bytes sent by each."""

    stage: int
    peak_bytes: int
    seconds: float
    sent_bytes: int
    exposed_seconds: float
    plan: GraphPlan = field(repr=False)

    @property
    def resharded(self) -> bool:
        """Whether gathered weights are given back after forward."""
        return self.stage == 3

    def to_data(self) -> dict[str, Any]:
        """The candidate as JSON holds it."""
        return {
            "stage": self.stage, "resharded": self.resharded, "peak_bytes": self.peak_bytes,
            "seconds": self.seconds, "sent_bytes": self.sent_bytes,
            "exposed_seconds": self.exposed_seconds,
            "repeated_seconds": self.plan.plan.figures.repeated_seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class ShardingPlan:
    """The stage that was chosen, the others that fit, and why the rest does not."""

    devices: int
    device: str
    memory: int
    link_bytes_per_second: float
    blocks: tuple[str, ...]
    chosen: Candidate
    others: tuple[Candidate, ...]
    failed: Mapping[int, str]

    @property
    def share(self) -> str | None:
        """The budget of each block's activations; None where everything is kept."""
        plan = self.chosen.plan
        if not plan.plan.repeats():
            return None
        constant, plain = plan.problem.constant, plain_peak(plan.problem)
        return f"{100 * (plan.plan.figures.peak - constant) / (plain - constant):.0f}%"

    def to_data(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return {
            "devices": self.devices, "device": self.device, "memory": self.memory,
            "link_bytes_per_second": self.link_bytes_per_second, "blocks": list(self.blocks),
            "block_budget": self.share, "chosen": self.chosen.to_data(),
            "others": [one.to_data() for one in self.others],
            "failed": {str(stage): text for stage, text in self.failed.items()},
        }  # fmt: skip


def link_speed(device: DeviceProfile) -> float:
    """Bytes a second between two devices: NVLink's where they have it, else the host link's."""
    if device.id in _NVLINK:
        return _NVLINK[device.id]
    rates = [link.bandwidth.basic for link in device.links if "host" in (link.start, link.end)]
    if not rates:
        raise InputError(
            f"the profile of {device.id} has no link", code="no-link", hint="pass --interconnect"
        )
    return max(rates)


def plan_sharding(
    model: nn.Module,
    example_inputs: Any,
    *,
    devices: int,
    device: DeviceProfile,
    memory: int,
    state_bytes: int = 0,
    loss: str = "auto",
    link: float | None = None,
    seconds: float = 10.0,
) -> ShardingPlan:
    """How ``devices`` devices with ``memory`` bytes each train a model on a batch for each of them.

    ``example_inputs`` are one device's batch, ``state_bytes`` the optimizer's state for all
    parameters, ``link`` the bytes a second that each device sends. Raises BudgetNotMet
    (``memory-budget-too-small``) where no stage fits, for the stage that needs least.
    """
    if devices < 1:
        raise InputError(f"devices is {devices}", code="bad-devices", hint="1 or more")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    names = {module: name for name, module in model.named_modules()}
    blocks = repeated_blocks(model)
    largest = max(sum(p.numel() * p.element_size() for p in b.parameters()) for b in blocks)
    link = link_speed(device) if link is None else link
    base = TrainingOptions(costs="device", device=device.id, seconds=seconds)
    found: list[Candidate] = []
    failed: dict[int, BudgetNotMet] = {}
    for stage in STAGES if devices > 1 else STAGES[:1]:
        shards = devices if stage else 1
        # What the step of one device, which is planned as if all weights lay there, does not hold.
        spared = 0
        if stage == 3:
            spared = max(0, weights - weights // shards - _GATHERED * largest)
        other = state_bytes // shards + (trained // shards if stage else 0)
        options = replace(
            base, memory_budget=memory + spared, other_bytes=other, update_at_once=stage > 0
        )
        try:
            plan = plan_training(model, example_inputs, options, loss=loss)
        except BudgetNotMet as error:
            failed[stage] = error
            continue
        found.append(_candidate(plan, stage, devices, weights, trained, link, spared))
    if not found:
        raise failed[max(failed)]
    # Traffic that is hidden is not for free: of equal ones, the one that sends less.
    chosen = min(found, key=lambda one: (one.seconds, one.sent_bytes, one.stage))
    return ShardingPlan(
        devices, device.id, memory, link, tuple(names[b] for b in blocks), chosen,
        tuple(one for one in found if one is not chosen),
        {stage: error.message.split(";")[0] for stage, error in failed.items()},
    )  # fmt: skip


def _candidate(
    plan: GraphPlan, stage: int, devices: int, weights: int, trained: int, link: float, spared: int
) -> Candidate:
    """Traffic of ring collectives; what forward or backward does not hide adds to the step."""
    part = (devices - 1) / devices
    problem = plan.problem
    forward = sum(call.seconds for call in problem.forward)
    backward = sum(call.seconds for call in problem.backward) + plan.plan.seconds
    gathered = part * weights if stage else 0.0
    reduced = part * trained * (1 if stage else 2)
    in_backward = reduced + (gathered if stage == 3 else 0.0)
    exposed = max(0.0, gathered / link - forward) + max(0.0, in_backward / link - backward)
    return Candidate(
        stage, plan.plan.figures.peak - spared, forward + backward + exposed,
        round(gathered + in_backward), exposed, plan,
    )  # fmt: skip


def script(plan: ShardingPlan, model: str, loss: str, learning_rate: float = 1e-3) -> str:
    """A program that trains ``model`` (as the command line names it) with the plan."""
    return _SCRIPT.format(
        devices=plan.devices, device=plan.device, stage=plan.chosen.stage,
        peak=plan.chosen.peak_bytes, seconds=plan.chosen.seconds, model=model, loss=loss,
        blocks=_names(plan.blocks), share=plan.share, resharded=plan.chosen.resharded,
        learning_rate=learning_rate,
    )  # fmt: skip


def _names(names: Sequence[str]) -> str:
    return "[" + ", ".join(repr(name) for name in names) + "]"


_SCRIPT = '''"""Train on {devices} devices; written by mopt train-plan for {device}.

ZeRO stage {stage}: estimated {peak:,} bytes on each device, {seconds:.4g} s a step.

    torchrun --nproc-per-node {devices} THIS_FILE [--steps N] [--check]

--check compares one step's gradients with those of a single process on all batches.
"""

import argparse
import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mopt.model_source import load_source
from mopt.training_plan import WithLoss

MODEL = {model!r}
LOSS = {loss!r}
STAGE = {stage}
# What each block's activations may take of what they take when all are kept; None: all.
BLOCK_BUDGET = {share!r}
BLOCKS = {blocks}


def set_up(model):
    """The model with its blocks planned by mopt and sharded."""
    for name in BLOCKS:
        block = model.get_submodule(name)
        if BLOCK_BUDGET is not None:
            block = torch.compile(block, backend="mopt", options={{"memory_budget": BLOCK_BUDGET}})
            model.set_submodule(name, block)
        if STAGE:
            fully_shard(block, reshard_after_forward={resharded})
    step = WithLoss(model, LOSS)
    if STAGE:
        return fully_shard(step, reshard_after_forward={resharded})
    return DistributedDataParallel(step)


def batch_of(inputs, rank, device):
    """A batch of this rank's own: the example's, rolled along its rows."""
    return [t.roll(rank, -1).to(device) if torch.is_tensor(t) else t for t in inputs]


def check(plain, step, inputs, device):
    """The largest difference of a gradient to that of one process, over its largest value."""
    count = dist.get_world_size()
    plain = WithLoss(plain, LOSS)
    (sum(plain(*batch_of(inputs, r, device)) for r in range(count)) / count).backward()
    expected = [p.grad for p in plain.parameters() if p.grad is not None]
    step(*batch_of(inputs, dist.get_rank(), device)).backward()
    found = [p.grad for p in step.parameters() if p.grad is not None]
    found = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]
    pairs = zip(expected, found, strict=True)
    far = max(((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item() for a, b in pairs)
    if dist.get_rank() == 0:
        print(f"largest difference of a gradient: {{far:.3g}}")
    return far


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if gpu else "cpu"
    torch.manual_seed(0)
    source = load_source(MODEL)
    model = source.model.to(device).train()
    inputs = source.example_inputs
    inputs = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    plain = copy.deepcopy(model) if given.check else None
    step = set_up(model)
    if given.check:
        far = check(plain, step, inputs, device)
        dist.destroy_process_group()
        raise SystemExit(far > 1e-4)
    optimizer = torch.optim.AdamW(step.parameters(), {learning_rate})
    for number in range(given.steps):
        loss = step(*batch_of(inputs, dist.get_rank(), device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(number, float(loss.detach()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
'''
