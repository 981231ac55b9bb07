"""Peak memory of the post-training passes, and GPTQ's time beside one calibration pass.

    python -m benchmarks.quantization_memory --output results.json

Each pass runs in a process of its own on a decoder of 12 layers of width 512 with 50 257 tokens
(257 MB in float32), on 4 batches of 1 x 256 tokens. The peak is the process's largest resident set,
what ``/usr/bin/time -v`` calls "Maximum resident set size", less that of the same process once
everything is imported and the pass has run on a tiny model. It is given as a multiple of the
float32 weights, beside the values and matrices that calibration held at most and the second moment
of the widest input (both part of the peak). Nothing but the pass holds the model.

``--times`` measures on the language model what GPTQ's time is made of: one run of the calibration
data, the Cholesky factors and inverses of all second moments, and the whole pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopt.calibration import Calibration
from mopt.files import write_file_atomic
from mopt.frontend import capture
from mopt.layers import find_layers
from mopt.models import gpt_12x768, pydoc_gpt
from mopt.pass_base import PassContext
from mopt.program import Program
from mopt.registry import make_pass
from mopt.second_order import inverse_factor

Options = dict[str, object]
PASSES: dict[str, tuple[str, Options]] = {
    "capture alone": ("remove-no-ops", {}),
    "round to nearest": ("quantize-weights", {"group": 128}),
    "clip for the output": ("quantize-weights", {"group": 128, "ranges": "output"}),
    "AWQ": ("scale-awq", {"group": 128}),
    "GPTQ": ("quantize-gptq", {"group": 128}),
    'GPTQ, aim = "layer"': ("quantize-gptq", {"group": 128, "aim": "layer"}),
    "HQQ": ("quantize-hqq", {}),
    "AdaRound": ("quantize-adaround", {"group": 128, "steps": 2}),
    "QAT by blocks": ("quantize-qat", {"steps": 2}),
    "SmoothQuant": ("smooth-activations", {}),
    "rotation": ("rotate-activations", {}),
    "outlier split": ("split-outliers", {"by": "value"}),
    "int8, ranges at run time": ("quantize-dynamic", {}),
    "int8, static ranges": ("quantize-static", {}),
    "and corrected biases": ("quantize-static", {"correct_bias": True}),
    "NF4": ("quantize-levels", {}),
}
TOKENS, BATCHES = 256, 4


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(label: str) -> dict[str, Any]:
    """One pass in this process: its peak and what that is made of."""
    torch.set_num_threads(1)
    name, options = PASSES[label]
    tiny = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    program = capture(tiny.eval(), (torch.randn(8, 256),)).copy()
    _run(program, name, options, [(torch.randn(8, 256),)])
    base = peak_bytes()
    ids = torch.randint(0, gpt_12x768.VOCABULARY, (BATCHES, 1, TOKENS))
    program = capture(gpt_12x768.Gpt(12, 512, 8).eval(), (ids[0],)).copy()
    gc.collect()  # of what capturing left in cycles, the weights are part
    weights = program.size_bytes()
    widest = max(layer.shape[1] for layer in find_layers(program) if layer.kind == "linear")
    started = time.perf_counter()
    stats = _run(program, name, options, [(batch,) for batch in ids])
    return {
        "pass": label,
        "weights_mb": weights / 1e6,
        "base_mb": base / 1e6,
        "peak_mb": (peak_bytes() - base) / 1e6,
        "times_weights": (peak_bytes() - base) / weights,
        "held_mb": stats.get("peak_activation_bytes", 0) / 1e6,
        "moment_mb": 4 * widest**2 / 1e6 if "peak_activation_bytes" in stats else 0.0,
        "seconds": time.perf_counter() - started,
    }


def _run(
    program: Program, name: str, options: Options, calls: list[tuple[torch.Tensor]]
) -> dict[str, Any]:
    context = PassContext(calibration=Calibration(calls, program))
    result = make_pass(name, options).run(program, context)
    return dict(result.stats)


def gptq_times() -> dict[str, float]:
    """Seconds of GPTQ on the language model and of the parts that it cannot do without."""
    torch.set_num_threads(1)
    program = capture(pydoc_gpt.build(), pydoc_gpt.example_inputs(), pydoc_gpt.dynamic_shapes())
    calls = list(pydoc_gpt.calibration())
    found: dict[str, float] = {}
    program.run(*calls[0])
    started = time.perf_counter()
    for call in calls:
        program.run(*call)
    found["one calibration pass"] = time.perf_counter() - started
    groups = {
        (layer.shape[1], layer.calls[0].args[0])
        for layer in find_layers(program)
        if layer.kind == "linear"
    }
    started = time.perf_counter()
    for width, _ in groups:
        rows = torch.randn(2 * width, width, dtype=torch.float64)
        inverse_factor(rows.t() @ rows / len(rows), torch.arange(width), 0.01, 1.0)
    found["factors"] = time.perf_counter() - started
    for label, more in {
        "GPTQ, plain": {"refinements": 0, "aim": "layer", "ranges": "mse"},
        "GPTQ, refined": {"aim": "layer"},
        "GPTQ, as preset": {},
    }.items():
        given = program.copy()
        options: Options = {"group": 128, **more}
        started = time.perf_counter()
        _run(given, "quantize-gptq", options, calls)
        found[label] = time.perf_counter() - started
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], choices=list(PASSES), help="these passes")
    parser.add_argument("--times", action="store_true", help="GPTQ's time instead")
    parser.add_argument("--child", choices=list(PASSES), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON, written anew after every pass")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return
    rows: list[dict[str, Any]] = []
    if options.times:
        rows = [dict(gptq_seconds=gptq_times())]
        for name, seconds in rows[0]["gptq_seconds"].items():
            print(f"{name}: {seconds:.2f} s")
    else:
        print("| pass | peak, MB | times weights | held, MB | moment, MB | seconds |")
        print("|---|---|---|---|---|---|", flush=True)
    for label in [] if options.times else options.only or PASSES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.quantization_memory", "--child", label],
            check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"| {label} | {row['peak_mb']:.0f} | {row['times_weights']:.2f} | "
            f"{row['held_mb']:.0f} | {row['moment_mb']:.0f} | {row['seconds']:.0f} |",
            flush=True,
        )
        if options.output:
            write_file_atomic(options.output, (json.dumps(rows, indent=1) + "\n").encode())
    if options.times and options.output:
        write_file_atomic(options.output, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
