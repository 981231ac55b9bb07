"""Which tile a kernel runs with: by a model of the chip without one, by measurement with one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mopt.backends.triton.aot import Binary, compile_launch
from mopt.backends.triton.architectures import Architecture
from mopt.backends.triton.kernel import Kernel, Problem
from mopt.backends.triton.launch import Launch, Tile
from mopt.errors import LoweringError

if TYPE_CHECKING:
    from mopt.cache import Cache
    from mopt.device import DeviceProfile

# How many tiles are compiled for one problem before it is given up, and how many are timed.
ATTEMPTS = 12
TIMED = 5
# Bytes a multiprocessor must have under way to use the whole bandwidth: 4.8 TB/s at 0.7 us is
# 26 KB each on 132 of them.
_IN_FLIGHT = 28_000
# What well-made kernels reach of the peaks.
_MEMORY, _COMPUTE = 0.85, 0.6


@dataclass(frozen=True)
class Chip:
    """The numbers of a device that a tile's time depends on."""

    units: int
    bandwidth: float
    rate: float
    issue: float
    launch: float


def chip_of(device: DeviceProfile) -> Chip:
    """A GPU's numbers from its profile."""
    processor = device.processors[0]
    units = int(processor.units.basic) if processor.units is not None else 1
    return Chip(
        units,
        device.tier(processor.memory).bandwidth.basic,
        device.peak("fp16"),
        # Four warps issue an instruction in every cycle; a lane of fp32 does two operations in one.
        device.peak("fp32") / 2,
        processor.launch.basic,
    )


def seconds(config: Tile, problem: Problem, kernel: Kernel, chip: Chip) -> float:
    """The estimated time of a problem with a tile, on a roofline with waves.

    Bytes and operations as the kernel states them; a tile also computes rows and columns that do
    not exist, has only so many bytes under way, and leaves units idle in its last wave.
    """
    amount = kernel.work(problem)
    sizes = config.constants
    rows, outputs = problem["rows"], problem["outputs"]
    bm, bn, split = sizes.get("BM", 1), sizes.get("BN", 1), sizes.get("SPLIT", 1)
    row_blocks, column_blocks = -(-rows // bm), -(-outputs // bn)
    padded = row_blocks * bm * column_blocks * bn / max(rows * outputs, 1)
    if kernel.grid is not None:
        row_blocks, column_blocks, split = kernel.grid(config, problem)
        padded = row_blocks * bm / max(rows, 1)
    blocks = row_blocks * column_blocks * split
    resident = max(1, min(8, 16 // config.warps))
    together = min(blocks, chip.units * resident)
    waves = -(-blocks // (chip.units * resident))
    idle = waves * chip.units * resident / blocks if blocks > together else 1.0
    per_block = amount.weight_bytes / max(column_blocks, 1) / max(problem["units"], 1)
    under_way = together / chip.units * (config.stages - 1) * per_block
    filled = min(1.0, under_way / _IN_FLIGHT)
    joined = 8.0 * split * rows * outputs if split > 1 else 0.0
    reads = amount.bytes + joined + (column_blocks - 1) * amount.activation_bytes * 0.02
    memory = reads / (chip.bandwidth * _MEMORY * max(filled, 0.05))
    share = min(1.0, bm * bn / (128 * 128)) ** 0.5
    used = min(1.0, blocks / chip.units)
    compute = amount.flops * padded * idle / (chip.rate * _COMPUTE * share * used)
    decode = amount.instructions * row_blocks / (chip.issue * used)
    return max(memory, compute, decode) + 0.3 * min(memory, compute + decode) + chip.launch


def ranked(problem: Problem, kernel: Kernel, chip: Chip) -> list[Tile]:
    """The legal tiles of a problem, the fastest by estimate first."""
    legal = [config for config in kernel.space(problem) if kernel.legal(config, problem) is None]
    return sorted(legal, key=lambda config: seconds(config, problem, kernel, chip))


@dataclass(frozen=True)
class Rejected:
    """A tile that was compiled and not taken, with the reason."""

    problem: str
    architecture: str
    tile: str
    reason: str


@dataclass
class Choice:
    """The tile of each bucket of rows for one problem, and all binaries it needs."""

    tiles: dict[int, Tile] = field(default_factory=dict)
    binaries: dict[str, Binary] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    measured: dict[int, dict[str, float]] = field(default_factory=dict)


def choose(
    problems: dict[int, Problem], kernel: Kernel, launches: Callable[[int, Tile], list[Launch]],
    arch: Architecture, chip: Chip, cache: Cache | None,
    timer: Callable[[int, Tile], float] | None = None,
) -> Choice:  # fmt: skip
    """Compile the best tile for every bucket of rows; those that do not fit give way to the next.

    ``launches`` makes the launches of a call with so many rows. Without ``timer`` the first by
    estimate that fits is taken, with it the fastest of the first few, in seconds for rows and tile.
    Raises LoweringError ``no-legal-tile`` where nothing that was tried fits the chip.
    """
    found = Choice()
    refused: dict[Tile, str] = {}
    for bucket, problem in problems.items():
        reasons: list[str] = []
        fits: dict[Tile, dict[str, Binary]] = {}
        for config in ranked(problem, kernel, chip):
            # Tiles that differ in how often K is split are the same code.
            same_code = _unsplit(config)
            if same_code in refused:
                continue
            made = {
                key: found.binaries.get(key) or compile_launch(one, arch, cache)
                for one in launches(bucket, config) for key in (one.key(),)
            }  # fmt: skip
            reason = next((r for b in made.values() if (r := b.refusal(arch))), None)
            if reason is None:
                fits[config] = made
                if len(fits) == (TIMED if timer else 1):
                    break
                continue
            refused[same_code] = reason
            reasons.append(f"{config}: {reason}")
            found.rejected.append(Rejected(problem.text, arch.name, str(config), reason))
            if len(reasons) == ATTEMPTS:
                break
        if not fits:
            raise LoweringError(
                f"no tile of {kernel.name} fits {arch.name} for {problem.text}",
                code="no-legal-tile",
                hint="; ".join(reasons[:3]) or "every tile was refused for other sizes of calls",
            )
        best = next(iter(fits))
        if timer is not None:
            times = {config: timer(bucket, config) for config in fits}
            best = min(times, key=lambda config: times[config])
            found.measured[bucket] = {str(config): taken for config, taken in times.items()}
        found.tiles[bucket] = best
        found.binaries.update(fits[best])
    return found


def _unsplit(config: Tile) -> Tile:
    sizes = tuple((name, min(value, 2) if name == "SPLIT" else value)
                  for name, value in config.sizes)  # fmt: skip
    return Tile(sizes, config.warps, config.stages)
