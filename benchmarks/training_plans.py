"""Plans of made-up training steps: a large joint graph's time, and chains against their optimum.

    python -m benchmarks.training_plans [--blocks 150] [--json FILE]

The large graph is a row of equal transformer-like blocks (11 forward and 22 backward calls each).
Chains have unit steps and backward steps of two; their optimum at half the memory is Checkmate's
published one (Jain et al., MLSys 2020).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from mopt.passes.checkpoint.plan import plan
from mopt.recompute import Again, Call, RecomputeProblem

# Output size, seconds and inputs (places back, 0 is the block's input) of a block's calls.
_BLOCK = [
    (1, 0.2, (0,)), (1, 1.0, (1,)), (1, 1.0, (1,)), (1, 1.0, (1,)), (1, 1.5, (2, 3, 4)),
    (1, 1.0, (5,)), (1, 0.2, (6, 0)), (1, 0.2, (7,)), (4, 4.0, (8,)), (4, 0.8, (9,)),
    (1, 4.0, (10, 7)),
]  # fmt: skip
_CHAINS = {8: (4, 39), 14: (7, 50), 20: (10, 71), 26: (13, 92), 40: (20, 141)}


def large(blocks: int) -> RecomputeProblem:
    """The step of ``blocks`` equal blocks."""
    sizes: list[int] = [1024]
    forward: list[Call] = []
    backward: list[Call] = []
    start = 0
    tapes: list[tuple[int, tuple[int, ...], float]] = []
    for number in range(blocks):
        own = [start]
        for place, (size, seconds, reads) in enumerate(_BLOCK):
            sources = tuple(own[r] for r in reads)
            made = len(sizes)
            sizes.append(1024 * size)
            own.append(made)
            again = Again(sources, (made,), seconds)
            forward.append(
                Call(
                    f"f{number}_{place}", sources, (made,), seconds, layer=f"b{number}", again=again
                )
            )
            tapes.append((made, sources, seconds))
        start = own[-1]
    gradient = len(sizes)
    sizes.append(1024)
    backward.append(Call("loss", (start,), (gradient,), 0.1))
    for made, sources, seconds in reversed(tapes):
        # One call for the input's gradient and one for the weight's, as matrix products have.
        new = len(sizes)
        sizes += [sizes[sources[0]], 64]
        backward.append(Call(f"x{made}", (gradient, made), (new,), seconds))
        backward.append(Call(f"w{made}", (gradient, *sources), (new + 1,), seconds))
        gradient = new
    results = frozenset(c.makes[0] for c in backward if c.name.startswith("w"))
    return RecomputeProblem(
        tuple(sizes), tuple(forward), tuple(backward), frozenset([0]), results, 1024
    )


def chain(length: int) -> RecomputeProblem:
    """``length`` unit steps; backward of each reads its own and the previous value."""
    forward = []
    for i in range(length):
        before = (i - 1,) if i else ()
        forward.append(Call(f"f{i}", before, (i,), 1.0, again=Again(before, (i,), 1.0)))
    backward = []
    for place, i in enumerate(reversed(range(length))):
        reads = [i, *([i - 1] if i else []), *([length + place - 1] if place else [])]
        backward.append(Call(f"b{i}", tuple(reads), (length + place,), 2.0))
    return RecomputeProblem(
        (1,) * (2 * length), tuple(forward), tuple(backward), results=frozenset([2 * length - 1])
    )


def main() -> None:
    """Print every plan, and write the figures with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=150)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {"chains": [], "large": []}
    for length, (budget, best) in _CHAINS.items():
        problem = chain(length)
        done = plan(problem, budget, seconds=2.0)
        seconds = problem.seconds + done.figures.repeated_seconds
        found["chains"].append({"length": length, "optimum": best, "found": seconds})
        print(found["chains"][-1], flush=True)
    problem = large(given.blocks)
    calls = len(problem.forward) + len(problem.backward)
    plain = plan(problem, 1 << 60, seconds=1.0).figures.peak
    for share in (0.5, 0.25):
        budget = problem.constant + int(share * (plain - problem.constant))
        cpu, wall = time.process_time(), time.perf_counter()
        done = plan(problem, budget)
        found["large"].append({
            "calls": calls, "share": share, "peak": done.figures.peak, "budget": budget,
            "cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall,
            "gap": done.gap, "solver": done.solver,
        })  # fmt: skip
        print(found["large"][-1], flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
