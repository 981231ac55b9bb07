"""The cost model that knows most about a device."""

from __future__ import annotations

from mopt.cache import Cache
from mopt.cost import CostModel
from mopt.cost_models.measured import MeasuredModel
from mopt.cost_models.roofline import Roofline
from mopt.device import DeviceProfile


def cost_model(
    device: DeviceProfile, *, timed: bool = False, cache: Cache | None = None,
    threads: int | None = None,
) -> CostModel:  # fmt: skip
    """Fitted to measurements where the profile has any, else from data sheets.

    ``timed`` times the operators it is asked about, if the device is this machine.
    """
    known = Roofline(device) if device.calibration is None else MeasuredModel(device)
    if not (timed and device.is_host):
        return known
    from mopt.cost_models.timed import TimedModel

    return TimedModel(known, cache, threads=threads)
