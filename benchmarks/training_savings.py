"""Numbers of the training extras: loss in pieces, lossy forms, optimizers, a whole fine-tuning.

    python -m benchmarks.training_savings [--parts loss,lossy,tune,...] [--steps 200]

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mopt
from mopt.allocations import record_allocations
from mopt.chunked_loss import linear_cross_entropy
from mopt.models import pydoc_gpt
from mopt.models._blocks import Decoder, SwiGLU
from mopt.models.gpt_12x768 import Gpt
from mopt.optim import FloatEightAdamW, LowRankAdamW
from mopt.optimizer_state import state_bytes
from mopt.streamed_backward import stream_blocks
from mopt.training_step import TrainingStep


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
    return _compare(model, (batch, batch), score, kinds)


def _compare(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    score: Callable[..., Tensor],
    kinds: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Peaks, gradients' errors and medians of step times by turns of several plans of a step."""
    steps, found = {}, {}
    for name, options in kinds.items():
        torch._dynamo.reset()
        own = copy.deepcopy(model)
        step = mopt.fit(own, score, batch, seconds=4.0, **options)
        steps[name] = (own, step)
        step.backward(*batch)
        own.zero_grad()
        with record_allocations() as seen:
            step.backward(*batch)
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
            step.backward(*batch)
            times[name].append(time.perf_counter() - started)
    for name, row in found.items():
        row["seconds_ratio"] = statistics.median(times[name]) / statistics.median(times["keep all"])
    return found


def wide(_steps: int) -> dict[str, Any]:
    """Products that are dear to repeat, at 30 % of the activations: exact, and int8 allowed."""
    torch.manual_seed(0)
    layers = [part for _ in range(8) for part in (nn.Linear(512, 512), nn.SiLU())]
    kinds: dict[str, dict[str, Any]] = {
        "keep all": {}, "exact 30%": {"memory_budget": "30%"},
        **{f"{form} 30%": {"memory_budget": "30%", "allow": "lossy", "lossy_form": form}
           for form in ("int8", "int8-running", "fp8-mixed")},
    }  # fmt: skip
    return _compare(nn.Sequential(*layers), (torch.randn(4096, 512),), _mean_square, kinds)


def _mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def _language() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = pydoc_gpt.build().train()
    data = [batch[0] for batch in pydoc_gpt.calibration()]
    return model, [(ids[:, :-1], ids[:, 1:]) for ids in data]


def _score(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


TUNED: dict[str, dict[str, Any]] = {
    "plain": {}, "exact": {}, "offload": {"offload": "auto"}, "lossy": {"allow": "lossy"},
    # On this processor repeating is the cheaper way; on one with slow products codes are kept.
    "lossy int8, priced for a Cortex-A76": {
        "allow": "lossy", "costs": "device", "device": "cpu-cortex-a76",
    },
    "lossy int4, priced for a Cortex-A76": {
        "allow": "lossy", "lossy_form": "int4", "costs": "device", "device": "cpu-cortex-a76",
    },
}  # fmt: skip


def tune(steps: int, only: str = "", known: dict[str, Any] | None = None) -> dict[str, Any]:
    """The trained language model, fine-tuned plainly and within 35 %: are losses equal?

    ``known`` are figures of earlier runs, which new ones join.
    """
    model, data = _language()
    runs = dict((known or {}).get("runs", {}))
    for name, options in TUNED.items():
        if only not in name:
            continue
        own = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(own.parameters(), 1e-4)
        run = partial(_plain_step, own, optimizer)
        if name != "plain":
            run = mopt.fit(
                own, _score, data[0], memory_budget="35%", optimizer=optimizer, other_bytes=0,
                seconds=2.0, **options,
            )  # fmt: skip
        losses = [float(run(*data[i % len(data)])) for i in range(steps)]
        with record_allocations() as seen:
            run(*data[0])
        runs[name] = {"losses": losses, "peak": seen.total.peak}
        if isinstance(run, TrainingStep):
            done = run.plans[0]
            runs[name] |= {
                "planned_peak": done.plan.figures.peak - done.kinds["weights and inputs"],
                "budget": done.plan.budget - done.kinds["weights and inputs"],
                "offloaded_bytes": sum(row.offloaded_bytes for row in done.layers),
                "squeezed_bytes": sum(row.squeezed_bytes for row in done.layers),
                "gradient_error": run.gradient_error and vars(run.gradient_error),
            }  # fmt: skip
        print(name, losses[-1], seen.total.peak, flush=True)
    found: dict[str, Any] = {"steps": steps, "runs": runs}
    plain = runs.get("plain", {}).get("losses")
    for name, one in runs.items():
        if plain and len(one["losses"]) == len(plain):
            last = statistics.mean(plain[-10:])
            found[name] = {
                "equal_bit_for_bit": one["losses"] == plain,
                "last_ten_apart": abs(statistics.mean(one["losses"][-10:]) - last) / last,
            }
    return found


def _plain_step(own: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    found = _score(own(x), y)
    found.backward()
    optimizer.step()
    optimizer.zero_grad()
    return found.detach()


def optimizers(steps: int, only: str = "", known: dict[str, Any] | None = None) -> dict[str, Any]:
    """The small language model trained from scratch with optimizers that keep less.

    A batch is one window of the text, seen once (there are 512); the loss is the mean of the last
    50 steps. ``only`` may set a rate: ``galore:2e-3``. The best rate of each counts.
    """
    ids = pydoc_gpt.windows(load_file(pydoc_gpt.TEXT)["calibration"])
    data = [(rows[:, :-1], rows[:, 1:]) for rows in ids[torch.randperm(len(ids))].split(1)]
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.0),
        "galore": lambda p, lr: LowRankAdamW(p, lr, rank=64, every=50, scale=1.0),
        "q-galore": lambda p, lr: LowRankAdamW(
            p, lr, rank=64, every=50, scale=1.0, quantized=True
        ),
        "dct": lambda p, lr: LowRankAdamW(p, lr, rank=64, every=1, scale=1.0, projection="dct"),
        "fp8": lambda p, lr: FloatEightAdamW(p, lr, weight_decay=0.0),
    }  # fmt: skip
    found = dict(known or {})
    wanted, _, rate = only.partition(":")
    for name, make in makers.items():
        if wanted and name != wanted:
            continue
        torch.manual_seed(1)
        own = pydoc_gpt.make_model().train()
        optimizer = make(own.parameters(), float(rate or 1e-3))
        run = partial(_plain_step, own, optimizer)
        losses = [float(run(*data[i % len(data)])) for i in range(steps)]
        row = {
            "state_bytes": state_bytes(optimizer), "rate": float(rate or 1e-3),
            "loss": statistics.mean(losses[-50:]),
        }  # fmt: skip
        print(name, row, flush=True)
        tried = [*found.get(name, {}).get("tried", []), row]
        found[name] = {**min(tried, key=lambda one: float(one["loss"])), "tried": tried}
    first = found.get("adamw")
    for one in found.values():
        if first:
            one["bytes_ratio"] = one["state_bytes"] / first["state_bytes"]
            one["loss_ratio"] = one["loss"] / first["loss"]
    return found


def stream(_steps: int) -> dict[str, Any]:
    """How long a sequence fits where per-block checkpoints of a quarter of it do."""
    torch.manual_seed(0)
    model = Gpt(layers=4, width=256, heads=4)
    model.positions = nn.Embedding(1 << 14, 256)
    found: dict[str, Any] = {"size": "4 layers, width 256, 50,257 words, one row"}
    peaks = {}
    for length in (512, 2048):
        ids = torch.randint(1000, (1, length))
        for name in ("checkpoint", "checkpoint, loss in pieces", "streamed"):
            own = copy.deepcopy(model)
            if name == "streamed":
                stream_blocks(own, torch.randint(1000, (1, 16)), pieces=max(8, length // 128))
            else:
                for block in own.blocks:
                    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            run = _dense_loss if name == "checkpoint" else _loss_in_pieces
            if name != "streamed" and length > 512:
                continue
            with record_allocations() as seen:
                run(own, ids).backward()
            peaks[name, length] = seen.total.peak
            found[f"{name} {length}"] = seen.total.peak
            if length == 512 and "," not in name:
                found[f"{name} gradients"] = [p.grad for p in own.parameters()]
            print(name, length, seen.total.peak, flush=True)
    one, two = found.pop("checkpoint gradients"), found.pop("streamed gradients")
    found["largest_difference"] = max(
        float((a - b).abs().max()) for a, b in zip(one, two, strict=True)
    )
    for name in ("checkpoint", "checkpoint, loss in pieces"):
        ratio = peaks["streamed", 2048] / peaks[name, 512]
        found[f"four times the length, to {name}"] = ratio
    return found


def _dense_loss(model: Gpt, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[0, :-1], ids[0, 1:])


def _loss_in_pieces(model: Gpt, ids: Tensor) -> Tensor:
    x = model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))
    for block in model.blocks:
        x = block(x)
    return linear_cross_entropy(model.norm(x)[0, :-1], model.head.weight, ids[0, 1:])


class Reversible(nn.Module):
    """Eight reversible blocks: two streams that change each other by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128)) for _ in range(16)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(0, len(self.parts), 2):
            x = x + self.parts[i](y)
            y = y + self.parts[i + 1](x)
        return x + y


class Layers(nn.Module):
    """Linear layers whose inputs only their weights' gradients read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def ways(_steps: int) -> dict[str, Any]:
    """Reversible blocks had again from their outputs, and sampled rows: peaks, time, gradients."""
    found: dict[str, Any] = {}
    candidates: list[tuple[str, Callable[[], nn.Module], str, dict[str, Any]]] = [
        ("reversible, exact", Reversible, "30%", {}),
        ("reversible, rounding", Reversible, "30%", {"allow": "rounding"}),
        ("layers, exact", Layers, "60%", {}),
        ("layers, rows", Layers, "60%", {"allow": "lossy", "lossy_form": "rows"}),
    ]
    for name, make, budget, options in candidates:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = make(), torch.randn(2048, 128)
        expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        step = mopt.fit(
            model, lambda y: y.square().mean(), (x,), memory_budget=budget, seconds=1.0, **options
        )
        step.backward(x)
        own = [p.grad for p in model.parameters()]
        far = [
            float((a - b).norm() / a.norm()) for a, b in zip(expected, own, strict=True)
            if b is not None
        ]  # fmt: skip
        model.zero_grad()
        with record_allocations() as seen:
            step.backward(x)
        (done,) = step.plans
        again = [done.problem.forward[i].form or "repeat" for i in done.plan.repeats()]
        found[name] = {
            "budget": done.plan.budget - done.kinds["weights and inputs"],
            "peak": seen.total.peak, "solver": done.plan.solver,
            "time_share": done.plan.seconds / done.problem.seconds, "worst_gradient": max(far),
            "ways": {kind: again.count(kind) for kind in sorted(set(again))},
        }  # fmt: skip
        print(name, found[name], flush=True)
    return found


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "loss": loss, "lossy": lossy, "tune": tune, "optimizers": optimizers, "stream": stream,
    "ways": ways, "wide": wide,
}  # fmt: skip


def main() -> None:
    """Print each part's figures, and write them with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", default="", help="one candidate of tune or optimizers")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    known: dict[str, Any] = {}
    if given.json and given.json.exists():
        known = json.loads(given.json.read_text())
    for name in given.parts.split(","):
        more = {}
        if name in ("tune", "optimizers"):
            more = {"only": given.only, "known": known.get(name)}
        known[name] = PARTS[name](given.steps, **more)
        if given.json:
            given.json.write_text(json.dumps(known, indent=1) + "\n")
        shown = {k: v for k, v in known[name].items() if k != "runs"}
        print(name, json.dumps(shown, indent=1), flush=True)


if __name__ == "__main__":
    main()
