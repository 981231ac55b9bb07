"""Which of a device's memories is the fast one, which the slow one, and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass

from mopt.device import DeviceProfile, MemoryTier
from mopt.errors import UsageError, quote
from mopt.passes.schedule._tier_model import Speeds
from mopt.tier_times import Link

# Where no device is named: an NVMe drive or a slow bus, and an ordinary core.
ASSUMED = Link(2e9, 1e-5)


@dataclass(frozen=True)
class Tiers:
    """The fast memory's name and capacity, the slow one's name, and how to get there."""

    fast: str
    capacity: int | None
    slow: str
    link: Link
    speeds: Speeds
    writable: bool = True


def tiers_of(device: DeviceProfile | None) -> Tiers:
    """The fastest memory that software manages, and the next one: a memory, or the host.

    Without a device the link and speeds are assumed ones. Raises UsageError (``no-tiers``) for a
    device with one memory and nothing behind it.
    """
    if device is None:
        return Tiers("fast", None, "slow", ASSUMED, Speeds())
    managed = sorted(
        (tier for tier in device.memory if tier.managed == "software"),
        key=lambda tier: -tier.bandwidth.basic,
    )
    writable = [tier for tier in managed if not tier.read_only]
    if not writable:
        raise UsageError(
            f"device {quote(device.id)} has no memory that a plan could fill", code="no-tiers"
        )
    fast = writable[0]
    slower = [tier for tier in managed if tier is not fast]
    way = next((link for link in device.links if link.end == fast.name), None)
    if not slower and way is None:
        raise UsageError(
            f"device {quote(device.id)} has one memory, {quote(fast.name)}, and no link to another",
            code="no-tiers",
            hint="leave the device out: --fast-memory alone assumes a link",
        )
    slow = slower[0].name if slower else way.start if way else ""
    return Tiers(
        fast.name, int(fast.capacity.basic), slow, _link(device, fast, slower, slow),
        _speeds(device, fast), writable=not (slower and slower[0].read_only),
    )  # fmt: skip


def _link(device: DeviceProfile, fast: MemoryTier, slower: list[MemoryTier], slow: str) -> Link:
    way = next((x for x in device.links if {x.start, x.end} == {slow, fast.name}), None)
    if way is not None:
        return Link(way.bandwidth.basic, way.latency.basic)
    return Link(slower[0].bandwidth.basic, slower[0].latency.basic)


def _speeds(device: DeviceProfile, fast: MemoryTier) -> Speeds:
    flops = device.peak("fp32") or max(
        (q.basic for p in device.processors for q in p.peak.values()), default=1.0
    )
    launch = min((p.launch.basic for p in device.processors), default=0.0)
    return Speeds(flops, fast.bandwidth.basic, launch)
