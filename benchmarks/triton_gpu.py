"""mopt's Triton kernels on one GPU beside named peers: correctness first, then ratios in one run.

    python benchmarks/triton_gpu.py [--minutes 8.5] [--json FILE] [--only NAME,...]
    python benchmarks/triton_gpu.py --interpret        # correctness on a CPU, small sizes
    python benchmarks/triton_gpu.py --dry-run          # every section on a CPU, times mean nothing

Needs torch and triton and the files of this checkout, nothing else. Copy bandwidth and the rate of
products are read first; every time is the median of replays of a CUDA graph by CUDA events, weights
taken in turn from more memory than the cache holds, and is printed as a share of those limits and
as a ratio to its peer, beside what was asked of it. Tiles are the best of the first few by the cost
model, measured. Sections stop when the minutes are over, and say so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

# isort: off
from triton_clock import Bench, DryBench  # first: it makes mopt importable
import torch
import triton_checks as checked
import triton_sections as sections
from triton_block import llama_block
from mopt.backends.triton.interpreter import run_interpreted
# isort: on

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "weight-only": sections.weight_only, "eight-bit": sections.eight_bit,
    "attention": sections.attention, "memory-bound": sections.memory_bound,
    "cross-entropy": sections.cross_entropy, "flash-svd": sections.flash_svd,
    "block": llama_block, "formats": sections.formats,
}  # fmt: skip


def correct(settings: Iterator[checked.Setting]) -> int:
    """Run every check; how many failed."""
    failed = 0
    for at in settings:
        for name, compute, limit in checked.checks(at):
            try:
                checked.poison(at.device)
                error = checked.error_of(*compute())
            except Exception as problem:  # a kernel that does not run is one wrong kernel
                print(f"FAILED {name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
                error = math.inf
            wrong = not error <= limit
            failed += wrong
            if wrong or at.device == "cuda":
                word = "WRONG" if wrong else "right"
                print(f"{word} {str(at.dtype)[6:]:8} {name:44} {error:.1e} (limit {limit:.0e})",
                      flush=True)  # fmt: skip
    return failed


def write(path: Path, bench: Bench, name: str, failed: int) -> None:
    """Keep the rows so far."""
    import triton

    data = {"device": name, "torch": torch.__version__, "triton": triton.__version__,
            "date": time.strftime("%Y-%m-%d"), "copy_bytes_per_second": bench.copy,
            "bf16_flops": bench.rate, "wrong": failed, "rows": bench.rows}  # fmt: skip
    path.write_text(json.dumps(data, indent=1))


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="when to stop measuring")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--interpret", action="store_true", help="correctness only, on the CPU")
    parser.add_argument("--dry-run", action="store_true", help="all sections, tiny, on the CPU")
    options = parser.parse_args()
    if options.interpret:
        small = iter([checked.Setting(run_interpreted, "cpu", 32, torch.float32)])
        failed = correct(small)
        print(f"{failed} wrong in the interpreter")
        sys.exit(bool(failed))
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("no GPU here: --interpret checks the kernels on a CPU, --dry-run the sections")
    bench = DryBench(options.minutes) if options.dry_run else Bench(options.minutes)
    name = "dry run, no GPU" if options.dry_run else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, copy {bench.copy / 1e12:.2f} TB/s, "
          f"bf16 product {bench.rate / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip

    def check(*types: torch.dtype) -> int:
        return correct(checked.Setting(bench.run, "cuda", 256, t) for t in types)

    # What is timed is checked first; the other types, each of which compiles every kernel anew,
    # have what time is left.
    failed = 0 if options.dry_run else check(torch.bfloat16)
    skipped = []
    for section in options.only.split(","):
        if bench.is_over():
            skipped.append(section)
            continue
        try:
            SECTIONS[section](bench)
        except Exception as error:  # the other sections are still worth their time
            print(f"FAILED {section}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            skipped.append(section)
        if not options.dry_run:
            torch.cuda.empty_cache()
        if options.json:  # what was measured stays, whatever ends this run
            write(options.json, bench, name, failed)
    for dtype in (torch.float16, torch.float32):
        if options.dry_run:
            continue
        if bench.is_over():
            skipped.append(f"checks in {str(dtype)[6:]}")
        else:
            failed += check(dtype)
    print(bench.summary())
    print(f"{failed} checks wrong; sections not finished: {', '.join(skipped) or 'none'}")
    if options.json:
        write(options.json, bench, name, failed)
    sys.exit(bool(failed or (options.dry_run and skipped)))


if __name__ == "__main__":
    main()
