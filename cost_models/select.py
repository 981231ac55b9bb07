"""The cost model that knows most about a device."""

from __future__ import annotations

from mopt.cost import CostModel
from mopt.cost_models.roofline import Roofline
from mopt.device import DeviceProfile


def cost_model(device: DeviceProfile) -> CostModel:
    """Fitted to measurements where the profile has any, else from data sheets."""
    if device.calibration is None:
        return Roofline(device)
    from mopt.cost_models.measured import MeasuredModel

    return MeasuredModel(device)
