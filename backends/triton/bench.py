"""Times a Triton artifact in this process: ``python -m mopt.backends.triton.bench DIR INPUTS N``.

Prints one JSON line as ``mopt.measure`` expects it. Runs on the GPU where there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mopt.backends.triton.lower import BACKEND
from mopt.bench_loop import run_bench
from mopt.npz_files import read_npz
from mopt.signature import Signature


def main(folder: str, inputs: str, threads: int) -> None:
    """Load, warm up, time and print."""
    arrays = read_npz(inputs)
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    empty = Signature((), (), (), {}, {"value": None})
    values = [torch.as_tensor(value).to(device) for value in arrays.values()]

    def load() -> Callable[[], Any]:
        runner = BACKEND.open(Path(folder), empty, threads=threads or None, device=device)

        def run() -> Any:
            outputs = runner.run(values)
            if device == "cuda":
                torch.cuda.synchronize()
            return outputs

        return run

    print(run_bench(load))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
