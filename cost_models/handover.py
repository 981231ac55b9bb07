"""What operators take in a model beyond what they take alone.

Timed alone, an operator finds its input where its last run left it, in the cache of the core that
wrote it, and weights that it read a moment ago. In a model it reads what another operator wrote, in
part on another core, and weights from a whole run ago. The difference goes with the bytes that are
moved, and is found by timing pieces of networks (``mopt.cost_models.probe_chains``) and their
operators one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from mopt.cost import Work
from mopt.cost_models.executed import executed_model
from mopt.cost_models.families import families
from mopt.cost_models.model_cost import node_work
from mopt.cost_models.probe import Probe, ProbeRun, plan_copies
from mopt.cost_models.probe_models import build_probe
from mopt.cost_models.roofline import Roofline
from mopt.device_calibration import Handover, handed_over
from mopt.disk import scratch

# Sizes of the pieces, each in every number format it has, and how often a block is repeated.
_ATTENTION = (
    ((128, 256, 4), 6), ((32, 384, 6), 6), ((256, 384, 12), 4), ((512, 192, 3), 4),
    ((16, 768, 12), 3),
)  # fmt: skip
_CAUSAL = (((128, 256, 4), 6), ((64, 576, 9), 4))
_RESIDUAL = (((64, 56), 3), ((128, 28), 4), ((256, 14), 4), ((32, 16), 8))
_SEPARABLE = (((16, 56), 3), ((32, 28), 6), ((96, 14), 4))
_PIECES = (
    ("chain.encoder", (0, 1, 2), _ATTENTION),
    ("chain.decoder", (0, 1, 2), _CAUSAL),
    ("chain.residual", (0, 1), _RESIDUAL),
    ("chain.separable", (0,), _SEPARABLE),
)
_LEAST_PIECES = 8
# What a piece counts for that was never timed without waiting for a processor.
_DISTURBED = 0.2
_HUBER = 0.05
_ROUNDS = 8


@dataclass(frozen=True)
class Piece:
    """A piece of a network: the model that is timed, and the operators that it runs."""

    probe: Probe
    works: tuple[Work, ...]

    def alone(self, time_of: Callable[[Work], float]) -> float:
        """Microseconds of its operators, each by itself."""
        return sum(time_of(work) for work in self.works)


def plan_pieces(most: int | None = None) -> list[Piece]:
    """All pieces, with what ONNX Runtime executes for them; ``most`` sizes of each kind."""
    return [
        Piece(probe, _works(probe))
        for family, formats, sizes in _PIECES
        for number_format in formats
        for dims, copies in sizes[:most]
        for probe in [Probe(family, (number_format, *dims), copies)]
    ]


def operators(pieces: Sequence[Piece], roofline: Roofline) -> list[Probe]:
    """The operators of pieces, each once, to be timed by themselves."""
    found = {
        (work.variant, work.shape)
        for piece in pieces for work in piece.works if work.variant in families()
    }  # fmt: skip
    return [
        Probe(name, dims, plan_copies(families()[name], dims, roofline))
        for name, dims in sorted(found)
    ]


def found_handover(pieces: Sequence[Piece], run: ProbeRun, roofline: Roofline) -> Handover:
    """What a run says in which pieces and their operators were timed."""
    times = {(s.family, s.dims): s.microseconds for s in run.samples}
    quiet = {(s.family, s.dims) for s in run.samples if s.is_quiet}

    def time_of(work: Work) -> float:
        if work.kind == "free":
            return run.tap_us
        known = times.get((work.variant, work.shape))
        return 1e3 * roofline.cost(work).milliseconds if known is None else known

    found, whole, trust = [], [], []
    for piece in pieces:
        key = piece.probe.family, piece.probe.dims
        parts = {(work.variant, work.shape) for work in piece.works if work.kind != "free"}
        if key in times and parts <= times.keys():
            found.append(piece)
            whole.append(times[key] * piece.probe.copies)
            trust.append(1.0 if key in quiet and parts <= quiet else _DISTURBED)
    return fit_handover(found, whole, time_of, trust)


def _works(probe: Probe) -> tuple[Work, ...]:
    built, inputs, _ = build_probe(probe.family, probe.dims, probe.copies)
    with scratch("mopt-piece") as folder:
        path = Path(folder) / "piece.onnx"
        path.write_bytes(built)
        return tuple(node_work(node) for node in executed_model(path, inputs).nodes)


def fit_handover(
    pieces: Sequence[Piece],
    times: Sequence[float],
    time_of: Callable[[Work], float],
    trust: Sequence[float] | None = None,
) -> Handover:
    """The terms, none negative, that explain best what pieces take beyond their operators.

    ``times`` are microseconds of the pieces, ``time_of`` knows those of operators alone, ``trust``
    weighs the pieces. Relative errors count, large ones less (Huber). Too few pieces give no terms.
    """
    if len(pieces) < _LEAST_PIECES:
        return Handover()
    whole = np.array(times)
    rest = (whole - [piece.alone(time_of) for piece in pieces]) / whole
    terms = np.array([
        np.sum([handed_over(work) for work in piece.works], axis=0) for piece in pieces
    ]) / whole[:, None]  # fmt: skip
    weights = start = np.sqrt(np.ones(len(pieces)) if trust is None else np.array(trust))
    found = np.zeros(terms.shape[1])
    for _ in range(_ROUNDS):
        found = _least_squares(terms * weights[:, None], rest * weights)
        wrong = np.abs(rest - terms @ found)
        weights = start * np.sqrt(np.minimum(1.0, _HUBER / np.maximum(wrong, 1e-9)))
    return Handover(*(float(value) for value in found))


def _least_squares(terms: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares without negative factors; with so few terms, every subset is tried."""
    best, least = np.zeros(terms.shape[1]), float(target @ target)
    for size in range(1, terms.shape[1] + 1):
        for chosen in map(list, combinations(range(terms.shape[1]), size)):
            found = np.linalg.lstsq(terms[:, chosen], target, rcond=None)[0]
            wrong = target - terms[:, chosen] @ found
            if (found >= 0).all() and float(wrong @ wrong) < least:
                least = float(wrong @ wrong)
                best = np.zeros(terms.shape[1])
                best[chosen] = found
    return best
