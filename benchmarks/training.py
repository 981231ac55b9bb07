"""Training steps within budgets: real peaks, equal gradients, recomputed time at equal real peak.

    python -m benchmarks.training [--models decoder,bert,...] [--json FILE]

Each model trains one step plainly, with ``backend="mopt"`` at 70, 50, 35 and 25 % of the plain
step's activations, and with two peers: PyTorch's own ``activation_memory_budget`` (its solvers),
and ``torch.utils.checkpoint`` around every block. For every peer, mopt is then given the very peak
that the peer reached. Peaks are bytes that PyTorch's CPU allocator handed out above what was held
before the step. Recomputed time is the calls (operator and shapes, as the profiler lists them) that
a step runs more often than the step that keeps everything, each kind at the least mean time that
was seen in any of the model's runs: the same price for everybody, on a busy machine too.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from mopt.allocations import record_allocations
from mopt.backends.dynamo import boxed, mopt_backend, session_of
from mopt.errors import MoptError
from mopt.models import _bert, resnet50, unet3d, vit
from mopt.models._blocks import Decoder, DecoderBlock, SwiGLU
from mopt.models._moe import WIDTH, DenseExperts

SHARES = (0.70, 0.50, 0.35, 0.25)
PEERS = [("dp", share) for share in SHARES] + [("greedy", 0.5), ("ilp", 0.5)]


class WithLoss(nn.Module):
    """The mean square of the first output: the loss takes next to nothing beside the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        first: Tensor = pytree.tree_leaves(self.model(*inputs))[0]
        return first.square().mean()


class Entry(NamedTuple):
    """A model, its batch, the class of the blocks that are checkpointed, and what was reduced."""

    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, ...]]
    block: type[nn.Module]
    size: str


def _ids(rows: int, length: int, words: int) -> tuple[Tensor, ...]:
    return (torch.randint(words, (rows, length)),)


def _decoder(width: int, layers: int, feed_forward: Callable[[], nn.Module]) -> nn.Module:
    return Decoder(
        vocabulary=1000, context=256, width=width, layers=layers, heads=width // 32,
        feed_forward=feed_forward,
    )  # fmt: skip


def _without_averages(model: nn.Module) -> nn.Module:
    """PyTorch's own partitioner saves averages that the step overwrites, and backward refuses."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


MODELS = {
    "decoder": Entry(
        lambda: _decoder(128, 12, lambda: SwiGLU(128, 384)), lambda: _ids(2, 256, 1000),
        DecoderBlock, "12 layers, width 128 (asked: 768), 2 x 256 tokens (asked: 512 long)",
    ),
    "bert": Entry(
        lambda: _bert.Encoder(6, 192, 6),
        lambda: (*_ids(8, 128, 1000), torch.ones(8, 128, dtype=torch.long)), _bert.Layer,
        "6 layers, width 192, 8 x 128 tokens",
    ),
    "vit": Entry(
        lambda: vit.VisionTransformer(6, 192, 6), lambda: (torch.randn(4, 3, 224, 224),), vit.Block,
        "6 layers, width 192, 4 images of 224 pixels",
    ),
    "resnet50": Entry(
        resnet50.ResNet, lambda: (torch.randn(16, 3, 96, 96),), resnet50.Bottleneck,
        "16 images of 96 pixels",
    ),
    "resnet50-batch": Entry(
        lambda: _without_averages(resnet50.ResNet()), lambda: (torch.randn(16, 3, 96, 96),),
        resnet50.Bottleneck, "16 images of 96 pixels, batch norm without running averages",
    ),
    "unet3d": Entry(
        unet3d.UNet3d, lambda: (torch.randn(1, 1, 32, 32, 32),), unet3d.Residual,
        "one volume of 32 x 32 x 32",
    ),
    "moe": Entry(
        lambda: _decoder(WIDTH, 3, DenseExperts), lambda: _ids(2, 256, 1000), DecoderBlock,
        "3 layers of 8 experts, width 256, 2 x 256 tokens",
    ),
}  # fmt: skip


class Run(NamedTuple):
    """One candidate's step: what it holds at most, its gradients, its calls."""

    peak: int
    gradients: list[Tensor]
    calls: Counter[Any]


class Bench:
    """All candidates of one model, measured in one process."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.entry, self.seconds = name, MODELS[name], seconds
        torch.manual_seed(0)
        self.model = WithLoss(self.entry.make()).train()
        self.batch = self.entry.batch()
        self.price: dict[Any, float] = {}
        self.rows: list[dict[str, Any]] = []

    def measure(self, run: Callable[..., Tensor], model: nn.Module) -> Run:
        """The second step's peak and gradients, and the third step's calls."""

        def step() -> None:
            model.zero_grad()
            torch.manual_seed(1)
            run(*self.batch).backward()

        start = {n: b.clone() for n, b in model.named_buffers()}
        step()
        for n, b in model.named_buffers():
            b.copy_(start[n])
        model.zero_grad()
        torch.manual_seed(1)
        with record_allocations() as seen:
            run(*self.batch).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        ) as profile:
            step()
        calls: Counter[Any] = Counter()
        for event in profile.key_averages(group_by_input_shape=True):
            if not event.key.startswith("aten::"):
                continue
            kind = (event.key, str(event.input_shapes))
            calls[kind] += event.count
            mean = 1e-6 * event.self_cpu_time_total / event.count
            self.price[kind] = min(mean, self.price.get(kind, mean))
        return Run(seen.total.peak, gradients, calls)

    def plain(self, blocks: bool) -> Run:
        """PyTorch as it is, with or without a checkpoint around every block."""
        own = copy.deepcopy(self.model)
        for module in own.modules():
            if blocks and isinstance(module, self.entry.block):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
        return self.measure(own, own)

    def mopt(self, budget: str | int | None) -> tuple[Run, dict[str, Any], int]:
        """The step under a budget, facts of its plan, and the bytes of weights and inputs."""
        torch._dynamo.reset()
        own = copy.deepcopy(self.model)
        options = {"memory_budget": budget, "seconds": self.seconds}
        found = self.measure(torch.compile(own, backend=mopt_backend, options=options), own)
        session = session_of(options)
        assert session is not None
        (done,) = session.plans
        fixed = done.kinds["weights and inputs"]
        figures, total = done.plan.figures, done.problem.seconds
        return found, {
            "budget": done.plan.budget - fixed, "planned": figures.peak - fixed,
            "planned_share": figures.repeated_seconds / total, "gap": done.plan.gap,
            "bound_share": done.plan.seconds_bound / total, "least": done.plan.least_peak - fixed,
            "solver": done.plan.solver, "solve_seconds": done.plan.solve_seconds,
        }, fixed  # fmt: skip

    def torch_budget(self, solver: str, share: float) -> Run:
        """PyTorch's own partitioner at one of its budgets."""

        def partition(*args: Any, **kwargs: Any) -> Any:
            with functorch_config.patch(
                activation_memory_budget=share, activation_memory_budget_solver=solver
            ):
                return min_cut_rematerialization_partition(*args, **kwargs)

        torch._dynamo.reset()
        own = copy.deepcopy(self.model)
        backend = aot_autograd(fw_compiler=boxed, bw_compiler=boxed, partition_fn=partition)
        return self.measure(torch.compile(own, backend=backend), own)

    def extra(self, found: Run, base: Run) -> float:
        """Seconds of the calls that a run makes more often than its base."""
        return sum(
            self.price[kind] * (count - base.calls[kind])
            for kind, count in found.calls.items()
            if count > base.calls[kind]
        )

    def all(self, asked: Sequence[float], wanted: str, save: Callable[[Any], None]) -> None:
        """The figures of the shares asked for and of the peers whose names hold ``wanted``."""
        plain = self.plain(blocks=False)
        base, _, fixed = self.mopt(None)
        step = sum(self.price[kind] * count for kind, count in base.calls.items())
        rows: list[dict[str, Any]] = []
        found = {
            "model": self.name, "size": self.entry.size, "plain_peak": plain.peak,
            "mopt_keep_all_peak": base.peak, "step_seconds": step, "rows": rows,
        }  # fmt: skip
        peers: list[tuple[str, Run | None, Callable[[], Run] | None]]
        peers = [(f"mopt {share:g}", None, None) for share in asked]
        peers.append(("checkpoint every block", plain, lambda: self.plain(blocks=True)))
        for solver, share in PEERS:
            name = f"torch {solver} {share:g}"
            peers.append((name, base, partial(self.torch_budget, solver, share)))
        for name, reference, make in peers:
            if make is not None and wanted not in name:
                continue
            row: dict[str, Any] = {"candidate": name}
            budget: str | int = f"{100 * float(name.split()[-1]):g}%" if make is None else 0
            if make is not None and reference is not None:
                try:
                    peer = make()
                except RuntimeError as error:
                    rows.append(row | {"peer_failed": str(error).splitlines()[0]})
                    print(self.name, rows[-1], flush=True)
                    save(found)
                    continue
                row |= {"peer_peak": peer.peak, "peer_equal": _equal(peer, plain),
                        "peer_recomputed_share": self.extra(peer, reference) / step}  # fmt: skip
                budget = peer.peak + fixed
            try:
                ours, facts, _ = self.mopt(budget)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                if not isinstance(error.inner_exception, MoptError):
                    raise
                row["failed"] = str(error.inner_exception).split(";")[0]
            else:
                row |= {"peak": ours.peak, "equal": _equal(ours, plain), **facts,
                        "recomputed_share": self.extra(ours, base) / step}  # fmt: skip
                if row.get("peer_recomputed_share"):
                    row["ratio"] = row["recomputed_share"] / row["peer_recomputed_share"]
            rows.append(row)
            print(self.name, row, flush=True)
            save(found)


def _equal(one: Run, other: Run) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.gradients, other.gradients, strict=True))


def main() -> None:
    """Print every candidate, and write all figures with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--peers", default="", help="only peers whose name holds this; 'none'")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="'' for none")
    parser.add_argument("--seconds", type=float, default=4.0, help="of search for each plan")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shares = [float(share) for share in given.shares.split(",") if share]
    torch.set_num_threads(1)
    known: dict[str, Any] = {}
    if given.json and given.json.exists():
        known = {row["model"]: row for row in json.loads(given.json.read_text())["models"]}

    def save(row: dict[str, Any]) -> None:
        if given.json:
            about = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
            # Candidates of earlier runs stay.
            own = {one["candidate"]: one for one in row["rows"]}
            before = known.get(row["model"], {}).get("rows", [])
            rows = [one for one in before if one["candidate"] not in own] + [*own.values()]
            known[row["model"]] = {**row, "rows": rows}
            whole = {**about, "models": [*known.values()]}
            given.json.write_text(json.dumps(whole, indent=1) + "\n")

    for name in given.models.split(","):
        Bench(name, given.seconds).all(shares, given.peers, save)


if __name__ == "__main__":
    main()
