"""What weight-only rounding of the zoo's language model costs, method by method.

    python benchmarks/quantization.py --bits 4 --seeds 3 --heldout 65536

Every method rounds all linear layers (the head included) to groups of 128 with float activations.
The calibration data is drawn anew for each seed from the model's calibration text; medians over the
seeds are printed as a Markdown table. Beside the bits per byte lost stands the divergence from the
float model (Kullback-Leibler, bits per byte), which noise in the text hardly moves. "recovered" is
the share of the loss of round-to-nearest, as it is commonly done (zero points, min-max ranges),
that a method takes back, in both measures; "of best" the same against round-to-nearest with the
ranges that are best for it here (least squared error).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from safetensors.torch import load_file
from torch import Tensor

from mopt.calibration import Calibration
from mopt.frontend import capture
from mopt.models import pydoc_gpt
from mopt.pass_base import PassContext
from mopt.program import Program
from mopt.registry import make_pass

Steps = list[tuple[str, dict[str, object]]]
COMMON = "round to nearest, zero points, min-max"
BEST = "round to nearest, least squares"


def methods(bits: int) -> dict[str, Steps]:
    """Named lists of passes; the first is the one that recovery is counted against."""
    common: dict[str, object] = {"bits": bits, "group": 128, "activations": "float"}
    scale: tuple[str, dict[str, object]] = ("scale-awq", {"bits": bits, "group": 128})
    zeros: dict[str, object] = {**common, "symmetric": False}
    scale_zeros = (scale[0], {**scale[1], "symmetric": False})
    plain = {"refinements": 0, "ranges": "mse", "aim": "layer"}
    widest = {"ranges": "min-max"}
    return {
        COMMON: [("quantize-weights", {**zeros, **widest})],
        BEST: [("quantize-weights", common)],
        "round to nearest, min-max": [("quantize-weights", {**common, **widest})],
        "round to nearest, zero points": [("quantize-weights", zeros)],
        "clip for the output": [("quantize-weights", {**common, "ranges": "output"})],
        "AWQ (scales and clip)": [scale, ("quantize-weights", {**common, "ranges": "output"})],
        "GPTQ, plain": [("quantize-gptq", {**common, **plain})],
        "GPTQ, aimed at the layer": [("quantize-gptq", {**common, "aim": "layer"})],
        "GPTQ": [("quantize-gptq", common)],
        "AWQ scales, GPTQ": [scale, ("quantize-gptq", common)],
        "GPTQ, zero points": [("quantize-gptq", zeros)],
        "AWQ scales, GPTQ, zero points": [scale_zeros, ("quantize-gptq", zeros)],
    }


def draw(seed: int, windows: int) -> list[tuple[Tensor]]:
    """That many windows of the calibration text in batches of eight."""
    ids = pydoc_gpt.windows(load_file(pydoc_gpt.TEXT)["calibration"])[:, :-1]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return [(batch,) for batch in ids[order[:windows]].split(8)]


def rounded(program: Program, steps: Steps, data: list[tuple[Tensor]]) -> Program:
    """The program after the passes, without the pipeline's checks, which would be timed too."""
    result = program.copy()
    for name, options in steps:
        context = PassContext(calibration=Calibration(data, result))
        make_pass(name, options).run(result, context)
        result.refresh()
    return result


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
    parser.add_argument("--bits", type=int, default=4, choices=(3, 4))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=96, help="calibration windows of 256 bytes")
    parser.add_argument("--heldout", type=int, default=65_536, help="bytes to judge on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="names of methods")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = load_file(pydoc_gpt.TEXT)["heldout"][: options.heldout + 1]
    program = capture(pydoc_gpt.build(), pydoc_gpt.example_inputs(), pydoc_gpt.dynamic_shapes())
    judge = Judge(program, text)
    print(f"float32: {judge.bits:.5f} bits per byte on {options.heldout} bytes", flush=True)
    print("| method | lost | divergence | recovered | of best | lost, range | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    known: dict[str, tuple[float, float]] = {}
    for name, steps in methods(options.bits).items():
        if options.only and name not in (*options.only, COMMON, BEST):
            continue
        needs_data = any(
            make_pass(one, given).requires(program, PassContext()) for one, given in steps
        )
        losses, seconds = [], []
        for seed in range(options.seeds if needs_data else 1):
            data, started = draw(seed, options.windows), time.perf_counter()
            result = rounded(program, steps, data)
            seconds.append(time.perf_counter() - started)
            losses.append(judge.loss(result))
        bits = [loss[0] for loss in losses]
        found = statistics.median(bits), statistics.median(loss[1] for loss in losses)
        known[name] = found
        shares = [
            " / ".join(f"{1 - one / base:.0%}" for one, base in zip(found, known[of], strict=True))
            if of in known else ""
            for of in (COMMON, BEST)
        ]  # fmt: skip
        print(
            f"| {name} | {found[0]:.5f} | {found[1]:.5f} | {shares[0]} | {shares[1]} | "
            f"{min(bits):.5f} to {max(bits):.5f} | {statistics.median(seconds):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
