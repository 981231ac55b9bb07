"""What weight-only rounding of the zoo's language model costs, method by method.

    python -m benchmarks.quantization --bits 4 3 2 --seeds 3 --output results.json

Every method rounds all linear layers (the head included) to groups of 128, with float activations
(with 2 bits, inputs in 8 bits, as the kernels compute). The calibration data is drawn anew for each
seed from the model's calibration text, in batches of two windows of 256 bytes; medians over the
seeds are printed as a Markdown table. Beside the bits per byte lost stands the divergence from the
float model (Kullback-Leibler, bits per byte), which noise in the text hardly moves. "recovered" is
the share of the loss of round-to-nearest, as it is commonly done (zero points, min-max ranges),
that a method takes back, in both measures; "of best" the same against round-to-nearest with the
ranges that are best for it here (least squared error). With 2 bits both are of 3 bits: what is
asked there is to beat those. Steps that several methods share run once per seed, and count in the
seconds of each. What the output file holds already is not measured again, so a run that was
stopped goes on where it was. ``benchmarks.quantization_recipes`` measures whole recipes on three
models.
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
from mopt.files import write_file_atomic
from mopt.frontend import capture
from mopt.models import pydoc_gpt
from mopt.pass_base import PassContext
from mopt.program import Program
from mopt.registry import make_pass

Options = dict[str, object]
Steps = list[tuple[str, Options]]
Entry = dict[str, Any]
COMMON = "round to nearest, zero points, min-max"
BEST = "round to nearest, least squares"


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
        "clip for the output": [("quantize-weights", {**common, **clip})],
        "AWQ (scales and clip)": [scale, ("quantize-weights", {**common, **clip})],
        "AWQ, zero points": [scale_zeros, ("quantize-weights", {**zeros, **clip})],
        "GPTQ, plain": [("quantize-gptq", {**common, **plain})],
        "GPTQ": [gptq],
        "AWQ scales, GPTQ": [scale, gptq],
        "GPTQ, tuned scales": [gptq, _tuned(200)],
        "GPTQ, zero points": [gptq_zeros],
        "GPTQ, zero points, tuned scales": [gptq_zeros, _tuned(200)],
        "AdaRound by blocks": [("quantize-adaround", {**common, "steps": 100})],
    }


def _two_bits() -> dict[str, Steps]:
    three: Options = {"bits": 3, "group": 128, "activations": "float"}
    two: Options = {"bits": 2, "group": 128, "symmetric": False}
    gptq: tuple[str, Options] = ("quantize-gptq", two)
    trained: tuple[str, Options] = ("quantize-qat", {**two, "steps": 300})
    return {
        COMMON: [("quantize-weights", {**three, "symmetric": False, "ranges": "min-max"})],
        BEST: [("quantize-weights", three)],
        "2 bits, round to nearest": [("quantize-weights", two)],
        "2 bits, GPTQ": [gptq],
        "2 bits, GPTQ, tuned scales": [gptq, _tuned(300)],
        "2 bits, trained by blocks": [trained],
        "2 bits, trained by blocks, tuned scales": [trained, _tuned(300)],
    }


def _tuned(steps: int) -> tuple[str, Options]:
    return "tune-scales", {"steps": steps, "rate": 0.004}


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


class Results:
    """Measured entries, one for each bits, method and seed, written to a file after each."""

    def __init__(self, path: Path | None, settings: Entry) -> None:
        self._path, self._settings = path, settings
        self.entries: list[Entry] = []
        if path is not None and path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            self.entries = [one for one in known if settings.items() <= one.items()]

    def find(self, bits: int, method: str) -> list[Entry]:
        """The entries of a method, seed by seed."""
        return [one for one in self.entries if (one["bits"], one["method"]) == (bits, method)]

    def add(self, entry: Entry) -> None:
        self.entries.append({**entry, **self._settings})
        if self._path is not None:
            write_file_atomic(self._path, (json.dumps(self.entries, indent=1) + "\n").encode())


def needs_data(steps: Steps) -> bool:
    """Whether any of the passes cannot run without calibration data."""
    return any(make_pass(one, given).requires(None, PassContext()) for one, given in steps)  # type: ignore[arg-type]


def measure(results: Results, bits: int, only: list[str], seeds: int, judge: Judge,
            rounder: Rounder) -> None:  # fmt: skip
    """Everything of that width that the results do not hold yet."""
    for name, steps in methods(bits).items():
        if only and name not in (*only, COMMON, BEST):
            continue
        known = {one["seed"] for one in results.find(bits, name)}
        for seed in range(seeds if needs_data(steps) else 1):
            if seed in known:
                continue
            result, seconds = rounder.after(steps, seed)
            lost, divergence = judge.loss(result)
            results.add(dict(bits=bits, method=name, seed=seed, lost=lost, divergence=divergence,
                             seconds=round(seconds, 1), steps=steps))  # fmt: skip
            print(f"{bits} bits, {name}, seed {seed}: {lost:.5f} {divergence:.5f}", flush=True)


def show(results: Results, bits: int) -> None:
    """Medians over the seeds as a Markdown table."""
    print(f"\n{bits} bits\n")
    print("| method | lost | divergence | recovered | of best | lost, range | seconds | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    medians: dict[str, tuple[float, float]] = {}
    for name in methods(bits):
        found = results.find(bits, name)
        if not found:
            continue
        lost = [one["lost"] for one in found]
        middle = statistics.median(lost), statistics.median(one["divergence"] for one in found)
        medians[name] = middle
        printed = [
            " / ".join(
                f"{1 - one / base:.0%}" for one, base in zip(middle, medians[of], strict=True)
            )
            if of in medians and name != of
            else ""
            for of in (COMMON, BEST)
        ]
        seconds = statistics.median(one["seconds"] for one in found)
        print(
            f"| {name} | {middle[0]:.5f} | {middle[1]:.5f} | {printed[0]} | {printed[1]} | "
            f"{min(lost):.5f} to {max(lost):.5f} | {seconds:.0f} | {len(found)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2], choices=(2, 3, 4))
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
    results = Results(
        options.output,
        {"heldout_bytes": options.heldout, "calibration_windows": options.windows},
    )
    for bits in options.bits:
        measure(results, bits, options.only, options.seeds, judge, rounder)
    for bits in options.bits:
        show(results, bits)


if __name__ == "__main__":
    main()
