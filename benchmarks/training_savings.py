"""Numbers of the training extras: loss in pieces, lossy forms, optimizers, a whole fine-tuning.

    python -m benchmarks.training_savings [--parts loss,lossy,tune,optimizers] [--steps 200]

Peaks are bytes that PyTorch's CPU allocator handed out above what was held before the step; times
are medians of steps that take turns. One thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mopt
from mopt.allocations import record_allocations
from mopt.chunked_loss import linear_cross_entropy
from mopt.models import pydoc_gpt
from mopt.models._blocks import Decoder, SwiGLU
from mopt.optim import FloatEightAdamW, LowRankAdamW
from mopt.optimizer_state import state_bytes


def loss(_steps: int) -> dict[str, Any]:
    """Bytes of a cross-entropy over 50,000 classes, dense and in pieces, besides the gradients."""
    x = torch.randn(512, 64, requires_grad=True)
    weight = torch.randn(50_000, 64, requires_grad=True)
    target = torch.randint(50_000, (512,))
    own = 4 * (weight.numel() + x.numel())

    def measure(run: Callable[[], Tensor]) -> dict[str, float]:
        x.grad = weight.grad = None
        started = time.perf_counter()
        with record_allocations() as seen:
            run().backward()
        return {"peak": seen.total.peak - own, "seconds": time.perf_counter() - started}

    dense = measure(lambda: F.cross_entropy(x @ weight.mT, target))
    pieces = measure(lambda: linear_cross_entropy(x, weight, target))
    return {
        "dense": dense, "pieces": pieces, "bytes_ratio": pieces["peak"] / dense["peak"],
        "seconds_ratio": pieces["seconds"] / dense["seconds"],
    }  # fmt: skip


def lossy(_steps: int) -> dict[str, Any]:
    """A decoder at half its activations: exact, and with lossy forms; step times by turns."""
    torch.manual_seed(0)
    model = Decoder(
        vocabulary=500, context=128, width=128, layers=6, heads=4,
        feed_forward=lambda: SwiGLU(128, 384),
    )  # fmt: skip
    batch = torch.randint(500, (4, 128))

    def score(logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())

    kinds: dict[str, dict[str, Any]] = {
        "keep all": {}, "exact 50%": {"memory_budget": "50%"},
        **{f"{form} 50%": {"memory_budget": "50%", "allow": "lossy", "lossy_form": form}
           for form in ("int8", "int4", "fp8")},
    }  # fmt: skip
    steps, found = {}, {}
    for name, options in kinds.items():
        torch._dynamo.reset()
        own = copy.deepcopy(model)
        step = mopt.fit(own, score, (batch, batch), seconds=4.0, **options)
        steps[name] = (own, step)
        step.backward(batch, batch)
        own.zero_grad()
        with record_allocations() as seen:
            step.backward(batch, batch)
        plan = step.plans[0]
        found[name] = {
            "peak": seen.total.peak, "planned_share": plan.plan.figures.repeated_seconds
            / plan.problem.seconds,
            "squeezed": sum(row.squeezed_bytes for row in plan.layers),
            "gradient_error": step.gradient_error and vars(step.gradient_error),
        }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(7):
        for name, (own, step) in steps.items():
            own.zero_grad()
            started = time.perf_counter()
            step.backward(batch, batch)
            times[name].append(time.perf_counter() - started)
    for name, row in found.items():
        row["seconds_ratio"] = statistics.median(times[name]) / statistics.median(times["keep all"])
    return found


def _language() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = pydoc_gpt.build().train()
    data = [batch[0] for batch in pydoc_gpt.calibration()]
    return model, [(ids[:, :-1], ids[:, 1:]) for ids in data]


def _score(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def tune(steps: int) -> dict[str, Any]:
    """The trained language model, fine-tuned plainly and within 35 %: are losses equal?"""
    model, data = _language()
    losses: dict[str, list[float]] = {}
    peaks = {}
    for name in ("plain", "mopt 35%"):
        own = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(own.parameters(), 1e-4)
        run: Callable[..., Tensor]
        if name == "plain":

            def run(x: Tensor, y: Tensor, own: Any = own, optimizer: Any = optimizer) -> Tensor:
                found = _score(own(x), y)
                found.backward()
                optimizer.step()
                optimizer.zero_grad()
                return found.detach()
        else:
            run = mopt.fit(
                own, _score, data[0], memory_budget="35%", optimizer=optimizer, other_bytes=0
            )
        losses[name] = [float(run(*data[i % len(data)])) for i in range(steps)]
        with record_allocations() as seen:
            run(*data[0])
        peaks[name] = seen.total.peak
    one, two = losses.values()
    return {
        "steps": steps, "first_loss": one[0], "last_loss": one[-1], "peaks": peaks,
        "equal_bit_for_bit": one == two,
    }  # fmt: skip


def optimizers(steps: int) -> dict[str, Any]:
    """The trained language model, fine-tuned with optimizers that keep less."""
    model, data = _language()
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adamw": lambda p: torch.optim.AdamW(p, 1e-4, weight_decay=0.0),
        "galore": lambda p: LowRankAdamW(p, 1e-4, rank=32, every=50, scale=1.0),
        "q-galore": lambda p: LowRankAdamW(p, 1e-4, rank=32, every=50, scale=1.0, quantized=True),
        "dct": lambda p: LowRankAdamW(p, 1e-4, rank=32, every=1, scale=1.0, projection="dct"),
        "fp8": lambda p: FloatEightAdamW(p, 1e-4, weight_decay=0.0),
    }  # fmt: skip
    found = {}
    for name, make in makers.items():
        own = copy.deepcopy(model)
        optimizer = make(own.parameters())
        size = state_bytes(optimizer)
        losses = []
        for i in range(steps):
            x, y = data[i % len(data)]
            value = _score(own(x), y)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(value.detach()))
        found[name] = {"state_bytes": size, "loss": statistics.mean(losses[-10:])}
        first = found["adamw"]
        found[name]["bytes_ratio"] = size / first["state_bytes"]
        found[name]["loss_ratio"] = found[name]["loss"] / first["loss"]
        print(name, found[name], flush=True)
    return found


PARTS = {"loss": loss, "lossy": lossy, "tune": tune, "optimizers": optimizers}


def main() -> None:
    """Print each part's figures, and write them with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in given.parts.split(","):
        found[name] = PARTS[name](given.steps)
        print(name, json.dumps(found[name], indent=1), flush=True)
    if given.json:
        known = json.loads(given.json.read_text()) if given.json.exists() else {}
        given.json.write_text(json.dumps({**known, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
