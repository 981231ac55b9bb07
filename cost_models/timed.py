"""The cost model of this machine that times the very operators it is asked about.

Fitted curves say what an operator of any size takes; those of one model are few, so they are timed
as they are: about a tenth of a second each, once for a machine, its runtime and number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from mopt.cache import Cache, source_hash
from mopt.cost import Cost, LayerRequest, ModelCost, Report, Work
from mopt.cost_models import (
    handover,
    probe,
    probe_chains,
    probe_child,
    probe_layers,
    probe_models,
    probe_values,
)
from mopt.cost_models.families import families
from mopt.cost_models.fit import point_noise
from mopt.cost_models.measured import MeasuredModel
from mopt.cost_models.probe import Dims, Probe, plan_copies, run_probes
from mopt.cost_models.roofline import Roofline
from mopt.cost_models.runtime import session_settings
from mopt.cost_models.serial import SerialModel
from mopt.device_calibration import CallOverhead, Handover
from mopt.errors import MoptError, UsageError
from mopt.machine import machine_fingerprint

_ROUNDS = 3
_SECONDS_PER_PROBE = 0.5
_LEAST_SECONDS, _MOST_SECONDS = 8.0, 60.0
# Operators on more bytes than this are left to the curves: timing them would take the memory.
_MOST_BYTES = 1 << 30
_BUCKET = "operators"
# The brief calibration: sizes of each kind of piece, rounds, and seconds at most.
_BRIEF_PIECES, _BRIEF_ROUNDS, _BRIEF_SECONDS = 2, 2, 20.0
# What is known of a timing besides its spread: the same operator in another place of a model.
_UNSURE = 0.05
_SOURCES = tuple(
    str(Path(module.__file__ or ""))
    for module in (
        handover,
        probe,
        probe_chains,
        probe_child,
        probe_layers,
        probe_models,
        probe_values,
    )
)


@dataclass(frozen=True)
class _Time:
    """What was found for an operator: microseconds and the standard error of their logarithm."""

    microseconds: float
    error: float


class TimedModel(SerialModel):
    """Timings where there are any, what ``base`` says otherwise.

    ``cache`` keeps timings that nothing disturbed, None keeps none; ``threads`` is what models run
    with, None the runtime's choice.
    """

    def __init__(
        self, base: Roofline | MeasuredModel, cache: Cache | None, *, threads: int | None = None
    ) -> None:
        self.device = base.device
        self.base = base
        self._cache = cache
        self._threads = threads
        self._spec = Roofline(base.device)
        self._known: dict[tuple[str, Dims], _Time] = {}
        self._tried: set[tuple[str, Dims]] = set()
        self._call: CallOverhead | None = None
        self._handover: Handover | None = None
        self._node_us = 1.0
        machine = machine_fingerprint(threads)
        self._where = {
            "machine": {k: machine[k] for k in ("cpu", "isa", "cores", "quota", "versions")},
            "threads": threads or 0,
            "session": session_settings(),
            "sources": source_hash(*_SOURCES),
        }

    def cost(self, work: Work) -> Cost:
        """The timing of this very operator, else the estimate of ``base``."""
        if work.kind == "free":
            return Cost(1e-3 * self._node_us, 0.3, 0.0, "measured", "launch")
        found = self._known.get((work.variant, work.shape))
        if found is None:
            return self.base.cost(work)
        return replace(
            self._spec.cost(work), milliseconds=1e-3 * found.microseconds,
            uncertainty=found.error, level="measured",
        )  # fmt: skip

    def prepare(self, requests: Sequence[LayerRequest], report: Report | None = None) -> None:
        """Time all operators of the layers that were not timed before."""
        from mopt.cost_models.layer_work import layer_works

        works: list[Work] = []
        for one in requests:
            try:
                works += layer_works(
                    one.kind, one.shape, one.weight_format, rows=one.rows, geometry=one.geometry,
                    sharers=one.sharers,
                )  # fmt: skip
            except UsageError as error:
                if error.code != "no-kernel":
                    raise
        self._time(works, report)

    def model_cost(
        self,
        model: str | PathLike[str],
        inputs: Mapping[str, Any] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> ModelCost:
        """See ``mopt.cost.CostModel``; the model's operators are timed one by one."""
        from mopt.cost_models.executed import executed_model
        from mopt.cost_models.model_cost import executed_cost, node_work

        executed = executed_model(model, inputs, sizes)
        self._time([node_work(node) for node in executed.nodes], None)
        return executed_cost(self, executed, self._call or CallOverhead(), self._handed_over())

    def _handed_over(self) -> Handover:
        """From the calibration; without one, from a brief one that is made once and kept."""
        if self.device.calibration is not None:
            return self.device.calibration.handover
        if self._handover is None and self._cache is not None:
            found = self._cache.get(_BUCKET, {**self._where, "handover": 2})
            if found is None:
                found = asdict(self._time_handover())
                self._store({"handover": 2}, found)
            self._handover = Handover(**found)
        return self._handover or Handover()

    def _time_handover(self) -> Handover:
        from mopt.cost_models.handover import found_handover, operators, plan_pieces

        pieces = plan_pieces(_BRIEF_PIECES)
        probes = [*(piece.probe for piece in pieces), *operators(pieces, self._spec)]
        try:
            run = run_probes(
                probes, seconds=_BRIEF_SECONDS, rounds=_BRIEF_ROUNDS, threads=self._threads
            )
        except MoptError:
            return Handover()
        return found_handover(pieces, run, self._spec)

    # ---- timing

    def _time(self, works: Sequence[Work], report: Report | None) -> None:
        wanted = {}
        for work in works:
            key = (work.variant, work.shape)
            if work.variant in families() and key not in self._tried:
                wanted[key] = work
        self._tried.update(wanted)
        for key in list(wanted):
            if self._recall(key) or wanted[key].bytes > _MOST_BYTES:
                del wanted[key]
        if not wanted:
            self._recall_call()
            return
        probes = [
            Probe(family, dims, plan_copies(families()[family], dims, self._spec))
            for family, dims in wanted
        ]
        seconds = min(max(_SECONDS_PER_PROBE * len(probes), _LEAST_SECONDS), _MOST_SECONDS)
        try:
            run = run_probes(
                probes, seconds=seconds, rounds=_ROUNDS, threads=self._threads, progress=report
            )
        except MoptError:
            # A compile is not lost because operators cannot be timed here: the curves remain.
            return
        self._call, self._node_us = run.call, run.tap_us
        self._store({"call": 1}, {
            "call_us": run.call.call_us, "input_us": run.call.input_us,
            "output_bytes_per_us": run.call.output_bytes_per_us, "node_us": run.tap_us,
        })  # fmt: skip
        for sample in run.samples:
            error = max(_UNSURE, point_noise(sample.spread, sample.is_quiet))
            found = _Time(sample.microseconds, error)
            self._known[sample.family, sample.dims] = found
            if sample.is_quiet:
                self._store(
                    {"family": sample.family, "dims": list(sample.dims)},
                    {"us": found.microseconds, "error": found.error},
                )

    def _recall(self, key: tuple[str, Dims]) -> bool:
        if self._cache is None:
            return False
        family, dims = key
        found = self._cache.get(_BUCKET, {**self._where, "family": family, "dims": list(dims)})
        if found is None:
            return False
        self._known[key] = _Time(float(found["us"]), float(found["error"]))
        return True

    def _recall_call(self) -> None:
        if self._call is None and self._cache is not None:
            found = self._cache.get(_BUCKET, {**self._where, "call": 1})
            if found is not None:
                self._node_us = float(found.pop("node_us"))
                self._call = CallOverhead(**found)

    def _store(self, key: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        if self._cache is not None:
            self._cache.put(_BUCKET, {**self._where, **key}, dict(value))
