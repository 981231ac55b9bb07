"""What data-free quantization gives back where channels differ much in range.

    python -m benchmarks.equalization --output results.json

A small MobileNet-style net is trained on scikit-learn's digits for each seed, from channels of
equal and of unequal size (``benchmarks.mobile_digits``). The other rows need no training: the
zoo's digits CNN (depthwise-separable at the end, trained) gets unequal channels: between each
pair of layers that only a relu separates, channel i is divided by a random factor in front and
multiplied by it behind, drawn log-uniformly from 1/`spread` to `spread`. In float that changes
nothing, and it is what makes per-tensor int8 fail on MobileNets. The held-out accuracy, the
agreement of the top class with float32 and the cosine of the logits are medians over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.mobile_digits import train
from mopt.calibration import Calibration
from mopt.frontend import capture
from mopt.models import digits_cnn
from mopt.pass_base import PassContext
from mopt.passes.quantize._pairs import NORMAL, find_pairs, groups_of, replace_argument
from mopt.passes.quantize.equalize_channels import scale_inputs
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.recipe import Recipe
from mopt.registry import make_pass

TENSOR = {"weights": "tensor"}
METHODS: dict[str, list[tuple[str, dict[str, object]]]] = {
    "float32": [],
    "int8, a scale per channel": [("quantize-static", {})],
    "int8, a scale per tensor": [("quantize-static", TENSOR)],
    "and biases corrected": [("quantize-static", {**TENSOR, "correct_bias": True})],
    "equalized": [("equalize-channels", {}), ("quantize-static", TENSOR)],
    "and biases corrected (equalized)": [
        ("equalize-channels", {}),
        ("quantize-static", {**TENSOR, "correct_bias": True}),
    ],
    "all of DFQ (int8-dfq)": [
        ("equalize-channels", {}),
        ("absorb-biases", {}),
        ("quantize-static", {**TENSOR, "correct_bias": True}),
    ],
}


def make_unequal(program: Program, spread: float, seed: int) -> Program:
    """The same function with channels between its layers rescaled at random."""
    result = program.copy()
    random = torch.Generator().manual_seed(seed)
    pairs, _ = find_pairs(result, make_pass("equalize-channels", {}))
    for first, second in pairs:
        weight, behind = result.constant(first.args[1]), result.constant(second.args[1])
        bias = result.constant(first.args[2])
        assert weight is not None and behind is not None and bias is not None
        factors = spread ** (2 * torch.rand(len(weight), generator=random) - 1).double()
        rows = factors.reshape(-1, *[1] * (weight.dim() - 1))
        scaled = scale_inputs(behind.double(), factors, groups_of(second))
        replace_argument(result, first, 1, weight.double() / rows, "unequal")
        replace_argument(result, first, 2, bias.double() / factors, "unequal")
        replace_argument(result, second, 1, scaled, "unequal")
        if NORMAL in first.meta:
            first.meta[NORMAL] = tuple(one / factors for one in first.meta[NORMAL])
    result.refresh()
    return result


def judge(program: Program, reference: torch.Tensor) -> tuple[float, float, float]:
    """Held-out accuracy, agreement with float32 and mean cosine of the logits."""
    images, labels = digits_cnn.split("heldout")
    logits = program.run(images)
    right = float((logits.argmax(1) == labels).float().mean())
    same = float((logits.argmax(1) == reference.argmax(1)).float().mean())
    return right, same, float(torch.cosine_similarity(logits, reference).mean())


def prepared(module: torch.nn.Module) -> Program:
    """The module captured, with its batch norms folded."""
    shapes = digits_cnn.dynamic_shapes()
    captured = capture(module.eval(), digits_cnn.example_inputs(), shapes)
    return Pipeline(Recipe.load("none").passes()).run(captured)


def sources(rescaled: list[float], trained: list[float]) -> dict[str, Callable[[int], Program]]:
    """What each case gives for a seed."""
    plain = prepared(digits_cnn.build())
    found: dict[str, Callable[[int], Program]] = {}
    for spread in rescaled:
        found[f"digits-cnn, rescaled by up to {spread:g}"] = partial(make_unequal, plain, spread)
    for spread in trained:
        label = f"trained from channels up to {spread:g} apart" if spread > 1 else "trained"
        found[f"MobileNet-style, {label}"] = partial(_trained, spread)
    return found


def _trained(spread: float, seed: int) -> Program:
    return prepared(train(seed, spread=spread))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--spreads", type=float, nargs="*", default=[8.0, 32.0])
    parser.add_argument("--trained", type=float, nargs="*", default=[1.0, 16.0, 64.0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for label, source in sources(options.spreads, options.trained).items():
        print(f"\n{label}\n\n| method | accuracy | same class | cosine |\n|---|---|---|---|")
        programs = [source(seed) for seed in range(options.seeds)]
        for name, steps in METHODS.items():
            found = []
            for program in programs:
                reference = program.run(digits_cnn.split("heldout")[0])
                data = Calibration(list(digits_cnn.calibration()), program)
                passes = [make_pass(one, given) for one, given in steps]
                result = Pipeline(passes).run(program, PassContext(calibration=data))
                found.append(judge(result, reference))
            accuracy, same, cosine = (statistics.median(one) for one in zip(*found, strict=True))
            rows.append(dict(case=label, method=name, accuracy=accuracy, same_class=same,
                             cosine=cosine, accuracies=[one[0] for one in found]))  # fmt: skip
            print(f"| {name} | {accuracy:.4f} | {same:.4f} | {cosine:.5f} |", flush=True)
            if options.output:
                options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
