"""Times an eager artifact in this process: ``python -m mopt.backends.eager.bench DIR INPUTS N``.

Prints one JSON line as ``mopt.measure`` expects it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mopt.backends.eager.lower import BACKEND
from mopt.bench_loop import run_bench
from mopt.npz_files import read_npz
from mopt.signature import Signature


def main(folder: str, inputs: str, threads: int) -> None:
    """Load, warm up, time and print."""
    arrays = read_npz(inputs)
    if threads:
        torch.set_num_threads(threads)
    empty = Signature((), (), (), {}, {"value": None})
    values = [torch.as_tensor(value) for value in arrays.values()]

    def load() -> Callable[[], Any]:
        runner = BACKEND.open(Path(folder), empty, threads=threads or None)
        return lambda: runner.run(values)

    print(run_bench(load))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
