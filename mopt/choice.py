"""What the chooser is told: the uncompressed model's costs, and what came of its earlier choices.

The chooser is a pass without memory. The driver builds and measures what it chose, and runs it
again with an :class:`Observation` of each round; the pass corrects its estimates by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Baseline:
    """The uncompressed model: bytes of its files; estimated ms, bytes and mJ where known."""

    size_bytes: int
    latency_ms: float | None = None
    peak_bytes: float | None = None
    energy_mj: float | None = None


@dataclass(frozen=True)
class Observation:
    """One round: what was estimated and what was measured of the same choice.

    Both map ``size`` (bytes), ``latency`` (ms), ``memory`` (bytes), ``energy`` (mJ, an estimate of
    the lowered model) and ``loss`` (share of quality lost) to values; a quantity that was not
    measured is absent. ``baseline`` has the uncompressed model's measured values. ``is_slower``
    says that it lost against the uncompressed model beyond noise. ``formats`` are the formats by
    layer. ``speed_band`` are the ends of the interval of the measured ratio of times, compressed
    over uncompressed. ``slower_layers`` were timed to take clearly longer than in the uncompressed
    model.
    """

    formats: Mapping[str, str]
    estimated: Mapping[str, float]
    measured: Mapping[str, float]
    baseline: Mapping[str, float] = field(default_factory=dict)
    is_slower: bool = False
    speed_band: tuple[float, float] | None = None
    slower_layers: frozenset[str] = frozenset()
