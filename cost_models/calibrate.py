"""Measure this machine and fit the cost model to what was found."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mopt.cost_models.families import families
from mopt.cost_models.family import Family
from mopt.cost_models.fit import fit_family, point_noise
from mopt.cost_models.handover import found_handover, operators, plan_pieces
from mopt.cost_models.host import class_profile
from mopt.cost_models.probe import (
    ProbeRun,
    Sample,
    plan_probes,
    run_probes,
)
from mopt.cost_models.roofline import Roofline, arithmetic
from mopt.cost_models.runtime import runtime_version, session_settings
from mopt.device import DeviceProfile, Source
from mopt.device_calibration import Calibration, FamilyFit, Point, Rates
from mopt.errors import LimitError
from mopt.machine import machine_fingerprint
from mopt.pass_base import Progress

FULL_SECONDS = 240.0
# What a timing takes on a quiet machine, session included.
_SECONDS_PER_TIMING = 0.055
# Below that a calibration takes each timing once.
_BRIEF_SECONDS = 60.0
_ROUNDS = 2
# A piece of a network takes as long as so many operators.
_PIECE_COST = 6
_LEAST_POINTS = 3
_SOURCE = "calibration"


def calibrate(
    seconds: float = FULL_SECONDS,
    *,
    threads: int | None = None,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> DeviceProfile:
    """A profile of this machine with fitted curves, after about ``seconds`` of measuring.

    ``threads`` is what models will run with, None the runtime's choice; ``names`` picks families.
    Raises LimitError ``calibration-failed`` where too little could be measured.
    """
    progress = progress or Progress()
    base = class_profile()
    roofline = Roofline(base)
    rounds = 1 if seconds < _BRIEF_SECONDS else _ROUNDS
    # Fitting takes time as well.
    timing = 0.9 * seconds
    pieces = plan_pieces() if names is None and rounds > 1 else []
    parts = operators(pieces, roofline)
    count = round(timing / rounds / _SECONDS_PER_TIMING) - len(parts) - _PIECE_COST * len(pieces)
    probes = plan_probes(count, roofline, names)
    load = os.getloadavg()[0]
    run = run_probes(
        [*(piece.probe for piece in pieces), *parts, *probes],
        seconds=timing, rounds=rounds, threads=threads,
        progress=lambda done, total: progress.step(done, total, "timings"),
    )  # fmt: skip
    fits, errors = _fit_all(base, run)
    if not fits:
        raise LimitError(
            f"only {len(run.samples)} operators could be timed",
            code="calibration-failed",
            hint="give it more time: --seconds 240",
        )
    calibration = Calibration(
        date=time.strftime("%Y-%m-%d"),
        runtime=f"onnxruntime {runtime_version()}",
        threads=threads or 0,
        seconds=round(run.seconds, 1),
        load=round(load, 2),
        disturbed=round(run.disturbed, 4),
        quiet=round(run.quiet, 4),
        node_us=round(run.tap_us, 3),
        call=run.call,
        handover=found_handover(pieces, run, roofline),
        median_error=round(float(np.median(errors)), 4) if errors else 1.0,
        error_90=round(float(np.quantile(errors, 0.9)), 4) if errors else 1.0,
        machine={**machine_fingerprint(threads), "session": session_settings()},
        fits=tuple(fits),
    )
    return _measured_profile(base, calibration, run)


def _fit_all(base: DeviceProfile, run: ProbeRun) -> tuple[list[FamilyFit], list[float]]:
    by_family: dict[str, list[Sample]] = {}
    for sample in run.samples:
        by_family.setdefault(sample.family, []).append(sample)
    fits, errors = [], []
    for name, samples in sorted(by_family.items()):
        if name not in families():  # a piece of a network
            continue
        quiet = [sample for sample in samples if sample.is_quiet]
        # Timings on a busy machine are too long more often than not: better few good ones.
        kept = quiet if len(quiet) >= max(_LEAST_POINTS, len(samples) // 2) else samples
        if len(kept) < _LEAST_POINTS:
            continue
        points = [
            Point(s.dims, s.microseconds, point_noise(s.spread, s.is_quiet)) for s in kept
        ]  # fmt: skip
        family = families()[name]
        fit, left_out = fit_family(family, points, _guess(base, family))
        fits.append(fit)
        errors.extend(left_out)
    return fits, errors


def _guess(base: DeviceProfile, family: Family) -> Rates:
    """What the class of processor suggests for a family."""
    (processor,) = base.processors
    efficiency = base.efficiency[family.kind]
    rate = processor.peak[arithmetic(processor, family.weight_format)].basic
    share = efficiency.memory.basic
    near, far = base.memory[0].bandwidth.basic, base.tier(processor.memory).bandwidth.basic
    return Rates(
        operations=rate * efficiency.compute.basic,
        weights=far * share,
        inputs=near * share,
        outputs=near * share,
        pieces=1e9,
        launch=1e-6,
        overlap=efficiency.overlap.basic,
    )


def _measured_profile(
    base: DeviceProfile, calibration: Calibration, run: ProbeRun
) -> DeviceProfile:
    """The class's profile with the best rates that were seen, and the calibration."""
    (processor,) = base.processors
    peak = dict(processor.peak)
    for number_format, family in (("fp32", "linear.fp32"), ("int8", "linear.int8-shared")):
        amount = families()[family].amount
        seen = [
            amount(s.dims).flops / s.microseconds * 1e6
            for s in run.samples if s.family == family and s.is_quiet
        ]  # fmt: skip
        if seen and number_format in peak:
            rate = replace(peak[number_format], value=round(max(seen) / 1e9, 1), unit="Gop/s")
            peak[number_format] = replace(rate, source=_SOURCE)
    source = Source(
        _SOURCE, "measurement",
        f"largest rate seen by mopt devices calibrate with {calibration.runtime}",
        calibration.date,
    )  # fmt: skip
    machine = calibration.machine
    return replace(
        base,
        id="host",
        name=f"{machine['cpu']}, {machine['cores']} cores",
        summary="this machine, as measured",
        processors=(replace(processor, peak=peak),),
        sources={**base.sources, _SOURCE: source},
        calibration=calibration,
    )
