"""What every kernel takes of a chip: ``python -m mopt.backends.triton.resources [sm_90 ...]``.

Compiles the catalogue ahead of time, for which no GPU is needed, and prints a table in Markdown.
"""

from __future__ import annotations

import sys

from mopt.backends.triton.aot import compile_launch
from mopt.backends.triton.architectures import find_architecture
from mopt.backends.triton.catalogue import catalogue
from mopt.cache import Cache
from mopt.errors import LoweringError


def main(names: list[str]) -> None:
    """Print the table for the given architectures."""
    architectures = [find_architecture(name) for name in names]
    cells = " | ".join(f"{a.name}: registers, shared KiB, spills" for a in architectures)
    print(f"| kernel | function | {cells} |")
    print("|---|---|" + "---|" * len(architectures))
    cache = Cache()
    for entry in catalogue():
        for launch in entry.launches():
            row = []
            for arch in architectures:
                try:
                    made = compile_launch(launch, arch, cache)
                except LoweringError as error:
                    row.append(error.message)
                    continue
                row.append(f"{made.registers}, {made.shared / 1024:.0f}, {made.spills}")
            print(f"| {entry.name} | `{launch.name}` | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["sm_80", "sm_90"])
