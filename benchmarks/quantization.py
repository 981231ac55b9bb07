"""What weight-only rounding of the zoo's language model costs, method by method.

    python benchmarks/quantization.py --bits 4 --seeds 3 --heldout 65536

Every method rounds all linear layers (the head included) to groups of 128 with float activations.
The calibration data is drawn anew for each seed from the model's calibration text; medians over the
seeds are printed as a Markdown table. "recovered" is the share of the loss of round-to-nearest
(symmetric, the least squared error of the weight) that a method takes back.
"""

from __future__ import annotations

import argparse
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


def methods(bits: int) -> dict[str, Steps]:
    """Named lists of passes; the first is the one that recovery is counted against."""
    common: dict[str, object] = {"bits": bits, "group": 128, "activations": "float"}
    scale: tuple[str, dict[str, object]] = ("scale-awq", {"bits": bits, "group": 128})
    zeros: dict[str, object] = {**common, "symmetric": False}
    scale_zeros = (scale[0], {**scale[1], "symmetric": False})
    plain = {"refinements": 0, "ranges": "mse"}
    return {
        "round to nearest": [("quantize-weights", common)],
        "round to nearest, min-max": [("quantize-weights", {**common, "ranges": "min-max"})],
        "clip for the output": [("quantize-weights", {**common, "ranges": "output"})],
        "AWQ (scales and clip)": [scale, ("quantize-weights", {**common, "ranges": "output"})],
        "GPTQ, plain": [("quantize-gptq", {**common, **plain})],
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


def bits_per_byte(program: Program, text: Tensor) -> float:
    """Bits per byte of ``text``, eight windows at a time."""
    return pydoc_gpt.bits_per_byte(lambda ids: program.run(ids), text, batch=8)


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
    reference = bits_per_byte(program, text)
    print(f"float32: {reference:.5f} bits per byte on {options.heldout} bytes", flush=True)
    print("| method | bits per byte lost | recovered | range over seeds | seconds |")
    print("|---|---|---|---|---|", flush=True)
    nearest = 0.0
    for name, steps in methods(options.bits).items():
        if options.only and name not in options.only and nearest:
            continue
        needs_data = any(
            make_pass(one, given).requires(program, PassContext()) for one, given in steps
        )
        losses, seconds = [], []
        for seed in range(options.seeds if needs_data else 1):
            data, started = draw(seed, options.windows), time.perf_counter()
            result = rounded(program, steps, data)
            seconds.append(time.perf_counter() - started)
            losses.append(bits_per_byte(result, text) - reference)
        loss = statistics.median(losses)
        nearest = nearest or loss
        print(
            f"| {name} | {loss:.5f} | {1 - loss / nearest:.0%} | {min(losses):.5f} to "
            f"{max(losses):.5f} | {statistics.median(seconds):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
