"""What weight-only rounding of the zoo's language model costs, method by method.

    python -m benchmarks.quantization --bits 4 --seeds 3 --output results.json

Every method rounds all linear layers (the head included) to groups of 128, with float activations
(with 2 bits, inputs in 8 bits, as the kernels compute). The calibration data is drawn anew for each
seed from the model's calibration text, in batches of two windows of 256 bytes; medians over the
seeds are printed as a Markdown table. Beside the bits per byte lost stands the divergence from the
float model (Kullback-Leibler, bits per byte), which noise in the text hardly moves. "recovered" is
the share of the loss of round-to-nearest, as it is commonly done (zero points, min-max ranges),
that a method takes back, in both measures; "of best" the same against round-to-nearest with the
ranges that are best for it here (least squared error). With 2 bits both are of 3 bits: what is
asked there is to beat those. Steps that several methods share run once per seed, and count in the
seconds of each.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mopt.calibration import Calibration
from mopt.frontend import capture
from mopt.models import pydoc_gpt
from mopt.pass_base import PassContext
from mopt.program import Program
from mopt.registry import make_pass

Options = dict[str, object]
Steps = list[tuple[str, Options]]
COMMON = "round to nearest, zero points, min-max"
BEST = "round to nearest, least squares"
TUNE: tuple[str, Options] = ("tune-scales", {"steps": 100, "rate": 0.004})


def methods(bits: int) -> dict[str, Steps]:
    """Named lists of passes; the first two are those that recovery is counted against."""
    common: Options = {"bits": bits, "group": 128, "activations": "float"}
    zeros: Options = {**common, "symmetric": False}
    if bits == 2:
        return _two_bits()
    scale: tuple[str, Options] = ("scale-awq", {"bits": bits, "group": 128})
    scale_zeros: tuple[str, Options] = (scale[0], {**scale[1], "symmetric": False})
    plain: Options = {"refinements": 0, "ranges": "mse", "aim": "layer"}
    gptq: tuple[str, Options] = ("quantize-gptq", common)
    gptq_zeros: tuple[str, Options] = ("quantize-gptq", zeros)
    clip: Options = {"ranges": "output"}
    return {
        COMMON: [("quantize-weights", {**zeros, "ranges": "min-max"})],
        BEST: [("quantize-weights", common)],
        "round to nearest, zero points": [("quantize-weights", zeros)],
        "AWQ (scales and clip)": [scale, ("quantize-weights", {**common, **clip})],
        "AWQ, zero points": [scale_zeros, ("quantize-weights", {**zeros, **clip})],
        "GPTQ, plain": [("quantize-gptq", {**common, **plain})],
        "GPTQ": [gptq],
        "GPTQ, tuned scales": [gptq, TUNE],
        "GPTQ, zero points": [gptq_zeros],
        "GPTQ, zero points, tuned scales": [gptq_zeros, TUNE],
        "AdaRound by blocks": [("quantize-adaround", {**common, "steps": 100})],
        "AWQ scales, GPTQ": [scale, gptq],
        "clip for the output": [("quantize-weights", {**common, **clip})],
    }


def _two_bits() -> dict[str, Steps]:
    three: Options = {"bits": 3, "group": 128, "activations": "float"}
    two: Options = {"bits": 2, "group": 128, "symmetric": False}
    trained: tuple[str, Options] = ("quantize-qat", {**two, "steps": 300})
    tune: tuple[str, Options] = (TUNE[0], {**TUNE[1], "steps": 300})
    return {
        COMMON: [("quantize-weights", {**three, "symmetric": False, "ranges": "min-max"})],
        BEST: [("quantize-weights", three)],
        "2 bits, round to nearest": [("quantize-weights", two)],
        "2 bits, GPTQ": [("quantize-gptq", two)],
        "2 bits, trained by blocks": [trained],
        "2 bits, trained by blocks, tuned scales": [trained, tune],
    }


def draw(seed: int, windows: int) -> list[tuple[Tensor]]:
    """That many windows of the calibration text in batches of two."""
    ids = pydoc_gpt.windows(load_file(pydoc_gpt.TEXT)["calibration"])[:, :-1]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return [(batch,) for batch in ids[order[:windows]].split(2)]


class Rounder:
    """Programs after passes, without the pipeline's checks, which would be timed too."""

    def __init__(self, program: Program, windows: int) -> None:
        self._program, self._windows = program, windows
        self._known: dict[tuple[int, str], tuple[Program, float]] = {}

    def after(self, steps: Steps, seed: int) -> tuple[Program, float]:
        """The program after all steps, and the seconds that they took."""
        if not steps:
            return self._program, 0.0
        key = seed, repr(steps)
        if key not in self._known:
            before, seconds = self.after(steps[:-1], seed)
            name, options = steps[-1]
            result, started = before.copy(), time.perf_counter()
            context = PassContext(
                calibration=Calibration(draw(seed, self._windows), result),
                unrounded=self._program,
                seed=seed,
            )
            make_pass(name, options).run(result, context)
            result.refresh()
            self._known[key] = result, seconds + time.perf_counter() - started
        return self._known[key]


class Judge:
    """Held-out text and what the float model says to it."""

    def __init__(self, program: Program, text: Tensor) -> None:
        self._windows = pydoc_gpt.windows(text)
        self._reference = self._logarithms(program)
        self.bits = self._bits(self._reference)

    def loss(self, program: Program) -> tuple[float, float]:
        """Bits per byte lost, and the divergence from the float model in bits per byte."""
        found = self._logarithms(program)
        each = (self._reference.exp() * (self._reference - found)).sum(-1)
        return self._bits(found) - self.bits, float(each.mean()) / math.log(2)

    def _bits(self, logarithms: Tensor) -> float:
        right = logarithms.gather(-1, self._windows[:, 1:, None])
        return -float(right.mean()) / math.log(2)

    @torch.no_grad()
    def _logarithms(self, program: Program) -> Tensor:
        batches = self._windows[:, :-1].split(8)
        return torch.cat([program.run(ids).float().log_softmax(-1) for ids in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=96, help="calibration windows of 256 bytes")
    parser.add_argument("--heldout", type=int, default=65_536, help="bytes to judge on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="names of methods")
    parser.add_argument("--output", type=Path, help="JSON, written anew after every method")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = load_file(pydoc_gpt.TEXT)["heldout"][: options.heldout + 1]
    program = capture(pydoc_gpt.build(), pydoc_gpt.example_inputs(), pydoc_gpt.dynamic_shapes())
    judge, rounder = Judge(program, text), Rounder(program, options.windows)
    print(f"float32: {judge.bits:.5f} bits per byte on {options.heldout} bytes", flush=True)
    print("| method | lost | divergence | recovered | of best | lost, range | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    known: dict[str, tuple[float, float]] = {}
    rows: list[dict[str, Any]] = []
    for name, steps in methods(options.bits).items():
        if options.only and name not in (*options.only, COMMON, BEST):
            continue
        needs_data = any(
            make_pass(one, given).requires(program, PassContext()) for one, given in steps
        )
        losses, seconds = [], []
        for seed in range(options.seeds if needs_data else 1):
            result, took = rounder.after(steps, seed)
            seconds.append(took)
            losses.append(judge.loss(result))
        bits = [loss[0] for loss in losses]
        found = statistics.median(bits), statistics.median(loss[1] for loss in losses)
        known[name] = found
        shares = {of: [1 - one / base for one, base in zip(found, known[of], strict=True)]
                  for of in (COMMON, BEST) if of in known}  # fmt: skip
        rows.append(dict(bits=options.bits, method=name, steps=steps, lost=bits,
                         divergence=[loss[1] for loss in losses], recovered=shares,
                         seconds=seconds, heldout_bytes=options.heldout,
                         calibration_windows=options.windows))  # fmt: skip
        printed = [
            " / ".join(f"{share:.0%}" for share in shares.get(of, ())) for of in (COMMON, BEST)
        ]
        print(
            f"| {name} | {found[0]:.5f} | {found[1]:.5f} | {printed[0]} | {printed[1]} | "
            f"{min(bits):.5f} to {max(bits):.5f} | {statistics.median(seconds):.0f} |",
            flush=True,
        )
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
