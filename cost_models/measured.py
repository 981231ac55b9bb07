"""The cost model of a device that was measured: fitted curves, and the roofline beyond them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

from mopt.cost import Cost, LayerRequest, ModelCost, Report, Work
from mopt.cost_models.families import families
from mopt.cost_models.fit import Predictor
from mopt.cost_models.roofline import Roofline
from mopt.cost_models.serial import SerialModel
from mopt.device import DeviceProfile

# An operator whose kernel was never timed: only its kind is known.
_UNSURE_TRANSFERRED = 0.6


class MeasuredModel(SerialModel):
    """Times from the calibration that a profile carries.

    A family that was not timed gets the roofline's estimate, marked ``transferred``.
    """

    def __init__(self, device: DeviceProfile) -> None:
        self.device = device
        assert device.calibration is not None
        self.calibration = device.calibration
        self._roofline = Roofline(device)
        known = families()
        self._predictors = {
            fit.family: Predictor(known[fit.family], fit)
            for fit in self.calibration.fits
            if fit.family in known
        }

    def cost(self, work: Work) -> Cost:
        """The time of one operator; ``work.variant`` names its family, ``shape`` its sizes."""
        if work.kind == "free":
            return Cost(1e-3 * self.calibration.node_us, 0.3, 0.0, "calibrated", "launch")
        spec = self._roofline.cost(work)
        predictor = self._predictors.get(work.variant)
        if predictor is None:
            return replace(spec, uncertainty=_UNSURE_TRANSFERRED, level="transferred")
        seconds, error = predictor.seconds(work.shape)
        return replace(spec, milliseconds=1e3 * seconds, uncertainty=error, level="calibrated")

    def prepare(self, requests: Sequence[LayerRequest], report: Report | None = None) -> None:
        """Nothing: all that is known is in the profile."""

    def model_cost(
        self,
        model: str | PathLike[str],
        inputs: Mapping[str, Any] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> ModelCost:
        """See ``mopt.cost.CostModel``."""
        from mopt.cost_models.model_cost import model_cost

        known = self.calibration
        return model_cost(self, model, inputs, sizes, call=known.call, handover=known.handover)
