"""Training steps within shares of their activations: real peaks, equal gradients, seconds.

    python -m benchmarks.training [--models decoder,cnn,bert] [--rounds 5] [--json FILE]

Each model trains one step plainly, with ``backend="mopt"`` at 70, 50, 35 and 25 % of the plain
step's activations, and with two peers: PyTorch's own ``activation_memory_budget`` at the same
shares, and ``torch.utils.checkpoint`` around every block. Peaks are bytes that PyTorch's CPU
allocator handed out above what was held before the step. Times are medians of rounds in which the
candidates take turns; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mopt.allocations import record_allocations
from mopt.backends.dynamo import boxed, mopt_backend, session_of
from mopt.errors import MoptError
from mopt.models.gpt_12x768 import Block

SHARES = (0.70, 0.50, 0.35, 0.25)


class Decoder(nn.Module):
    """Pre-norm decoder blocks with dropout and a language-model loss."""

    def __init__(self, causal_width: int = 128, layers: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(500, causal_width)
        self.blocks = nn.ModuleList(Block(causal_width, 4) for _ in range(layers))
        self.head = nn.Linear(causal_width, 500)

    def forward(self, ids: Tensor, run: Callable[..., Tensor] | None = None) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = F.dropout(run(block, x) if run else block(x), 0.1, self.training)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())

    @staticmethod
    def batch() -> Tensor:
        return torch.randint(500, (4, 128))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Cnn(nn.Module):
    """Residual blocks with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(16) for _ in range(6))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor, run: Callable[..., Tensor] | None = None) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = run(block, x) if run else block(x)
        return self.head(x.mean((2, 3))).square().mean()

    @staticmethod
    def batch() -> Tensor:
        return torch.randn(8, 3, 32, 32)


class Bert(nn.Module):
    """Post-norm encoder layers as in BERT, from torch.nn, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(500, 128)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(128, 4, 512, 0.1, "gelu", batch_first=True) for _ in range(6)
        )
        self.head = nn.Linear(128, 500)

    def forward(self, ids: Tensor, run: Callable[..., Tensor] | None = None) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = run(block, x) if run else block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())

    batch = staticmethod(Decoder.batch)


MODELS: dict[str, type[Any]] = {"decoder": Decoder, "cnn": Cnn, "bert": Bert}


def _step(run: Callable[[], Tensor], model: nn.Module) -> None:
    torch.manual_seed(1)
    model.zero_grad()
    run().backward()


def _measure(run: Callable[[], Tensor], model: nn.Module) -> tuple[int, list[Tensor]]:
    """The peak of a second step, and the gradients."""
    _step(run, model)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.manual_seed(1)
    with record_allocations() as seen:
        run().backward()
    return seen.total.peak, gradients


def _torch_budget(share: float) -> Callable[..., Any]:
    from torch._dynamo.backends.common import aot_autograd

    def partition(*args: Any, **kwargs: Any) -> Any:
        with functorch_config.patch(activation_memory_budget=share):
            return min_cut_rematerialization_partition(*args, **kwargs)

    backend: Callable[..., Any] = aot_autograd(
        fw_compiler=boxed, bw_compiler=boxed, partition_fn=partition
    )
    return backend


def candidates(
    model: nn.Module, x: Tensor, shares: Sequence[float], seconds: float
) -> dict[str, Callable[[], Any]]:
    """Name to a function that makes (model, run, facts of the plan)."""

    def plain() -> Any:
        own = copy.deepcopy(model)
        return own, lambda: own(x), {}

    def blocks() -> Any:
        own = copy.deepcopy(model)

        def again(block: nn.Module, value: Tensor) -> Tensor:
            result: Tensor = checkpoint(block, value, use_reentrant=False)
            return result

        return own, lambda: own(x, again), {}

    def mopt(share: float) -> Any:
        own = copy.deepcopy(model)
        options = {"memory_budget": f"{100 * share:g}%", "seconds": seconds}
        run = torch.compile(own, backend=mopt_backend, options=options)
        run(x)
        session = session_of(options)
        assert session is not None
        (done,) = session.plans
        fixed = done.kinds["weights and inputs"]
        return own, lambda: run(x), {
            "budget": done.plan.budget - fixed, "planned": done.plan.figures.peak - fixed,
            "least": done.plan.least_peak - fixed, "solver": done.plan.solver,
            "repeated": done.plan.figures.repeated_seconds / done.problem.seconds,
            "gap": done.plan.gap,
        }  # fmt: skip

    def peer(share: float) -> Any:
        own = copy.deepcopy(model)
        run = torch.compile(own, backend=_torch_budget(share))
        return own, lambda: run(x), {}

    found: dict[str, Callable[[], Any]] = {"plain": plain, "checkpoint every block": blocks}
    for share in shares:
        found[f"mopt {share:.0%}"] = lambda share=share: mopt(share)
        found[f"torch budget {share:g}"] = lambda share=share: peer(share)
    return found


def bench(
    name: str, rounds: int, shares: Sequence[float] = SHARES, seconds: float = 4.0
) -> list[dict[str, Any]]:
    """One row for each candidate."""
    torch.manual_seed(0)
    model = MODELS[name]()
    x = MODELS[name].batch()
    rows, runs = [], {}
    expected: list[Tensor] = []
    for label, make in candidates(model, x, shares, seconds).items():
        torch._dynamo.reset()
        try:
            own, run, facts = make()
            peak, gradients = _measure(run, own)
        except (MoptError, torch._dynamo.exc.BackendCompilerFailed) as error:
            reason = getattr(error, "inner_exception", error)
            rows.append({"model": name, "candidate": label, "failed": str(reason).split(";")[0]})
            continue
        expected = expected or gradients
        equal = all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))
        rows.append(
            {"model": name, "candidate": label, "peak": peak, "gradients_equal": equal, **facts}
        )
        runs[label] = (run, own)
        print(f"{name:8} {label:24} {peak} bytes, equal={equal} {facts}", flush=True)
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, (run, own) in runs.items():
            started = time.perf_counter()
            _step(run, own)
            times[label].append(time.perf_counter() - started)
    for row in rows:
        if row["candidate"] in times:
            row["seconds"] = statistics.median(times[row["candidate"]])
    return rows


def main() -> None:
    """Print a line for each candidate, and write all figures with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shares", default=",".join(map(str, SHARES)))
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU seconds for each plan")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    every = []
    shares = [float(share) for share in given.shares.split(",")]
    for name in given.models.split(","):
        rows = bench(name, given.rounds, shares, given.seconds)
        every += rows
        plain = rows[0]
        for row in rows:
            if "failed" in row:
                print(f"{name:8} {row['candidate']:24} {row['failed']}", flush=True)
                continue
            extra = "".join(
                f" {key}={row[key]:,.3g}" if isinstance(row[key], float) else f" {key}={row[key]}"
                for key in ("budget", "planned", "least", "repeated", "gap", "solver")
                if key in row
            )
            print(
                f"{name:8} {row['candidate']:24} peak {row['peak'] / 2**20:7.2f} MiB "
                f"({row['peak'] / plain['peak']:.2f}) step x{row['seconds'] / plain['seconds']:.2f}"
                f" equal={row['gradients_equal']}{extra}",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(every, indent=1) + "\n")


if __name__ == "__main__":
    main()
