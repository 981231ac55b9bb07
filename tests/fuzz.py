"""Check the laws on random programs for as long as wanted.

    python -m tests.fuzz --seed 7 --minutes 10

Prints how many programs were checked; a failure ends with hypothesis's smallest example.
"""

from __future__ import annotations

import argparse
import time

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.case import Sample
from tests.laws import check_all
from tests.strategies import samples


def main() -> None:
    """Run until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=12, help="operators and motifs per program")
    options = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * options.minutes
    counts = {"checked": 0, "discarded": 0}
    batch = 0
    while time.monotonic() < deadline:

        @seed(options.seed * 1_000_003 + batch)
        @settings(
            max_examples=50,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(samples(max_steps=options.steps))
        def check(sample: Sample) -> None:
            if time.monotonic() < deadline:
                counts["checked" if check_all(sample) else "discarded"] += 1

        check()
        batch += 1
    print(f"seed {options.seed}: {counts['checked']} programs, {counts['discarded']} discarded")


if __name__ == "__main__":
    main()
