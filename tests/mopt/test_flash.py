"""Bundles of neurons, and what reading them costs."""

from __future__ import annotations

import random

import pytest
import torch

from mopt.errors import InputError
from mopt.flash import best_window, bundle_neurons, neuron_reads, unbundle_neurons
from mopt.tier_times import Link
from tests.tiny import normal

FLASH = Link(6e9, 100e-6, requests=8, lane=1.2e9)


def test_bundles_give_back_the_weights_bit_for_bit() -> None:
    down, up, gate = normal(8, 32), normal(32, 8), normal(32, 8)
    bundles = bundle_neurons(down, up, gate)
    assert bundles.shape == (32, 24) and bundles.is_contiguous()
    assert torch.equal(bundles[5], torch.cat([up[5], gate[5], down[:, 5]]))
    for given, found in zip((down, up, gate), unbundle_neurons(bundles, 8), strict=True):
        assert torch.equal(given, found)


def test_the_neurons_that_are_not_zero_are_enough() -> None:
    # Whole numbers: sums are exact in any order.
    down, up, x = (normal(*shape).mul(4).round() for shape in ((8, 64), (64, 8), (8,)))
    bundles = bundle_neurons(down, up)
    active = (up @ x > 0).nonzero()[:, 0]
    some_down, some_up = unbundle_neurons(bundles[active], 8)
    assert 0 < len(active) < 64
    assert torch.equal(some_down @ torch.relu(some_up @ x), down @ torch.relu(up @ x))


def tokens(count: int = 40, neurons: int = 400, share: float = 0.1) -> list[list[int]]:
    """Sets that drift: most neurons of a token are those of the one before."""
    rng = random.Random(0)
    now = rng.sample(range(neurons), int(neurons * share))
    found = []
    for _ in range(count):
        for k in rng.sample(range(len(now)), len(now) // 3):
            now[k] = rng.randrange(neurons)
        found.append(list(now))
    return found


def test_wider_windows_read_less_and_hold_more() -> None:
    reads = [neuron_reads(tokens(), 8192, 3, FLASH, window=w) for w in range(1, 8)]
    assert [r.read_bytes for r in reads] == sorted((r.read_bytes for r in reads), reverse=True)
    assert [r.resident_bytes for r in reads] == sorted(r.resident_bytes for r in reads)
    assert reads[0].read_bytes > 1.1 * reads[6].read_bytes


def test_reads_and_room_are_counted_by_hand() -> None:
    active = [[0, 1], [1, 2], [0, 2]]
    one = neuron_reads(active, 100, 2, Link(1e3), window=1)
    # Loaded: 0 and 1, then 2, then 0; 1 and 2 stay from one token to the next.
    assert one.read_bytes == 4 * 200 / 3
    assert one.resident_bytes == 3 * 200
    assert one.seconds == pytest.approx(4 * 200 / 1e3 / 3)
    assert neuron_reads(active, 100, 2, Link(1e3), window=2).read_bytes == 3 * 200 / 3


def test_bundles_are_faster_to_read() -> None:
    apart = neuron_reads(tokens(), 8192, 3, FLASH, window=3, bundled=False)
    together = neuron_reads(tokens(), 8192, 3, FLASH, window=3)
    assert together.read_bytes == apart.read_bytes
    assert apart.seconds / together.seconds == pytest.approx(FLASH.rate(24576) / FLASH.rate(8192))


def test_the_window_that_fits_is_chosen() -> None:
    wide = best_window(tokens(), 8192, 3, FLASH, most_bytes=1 << 30)
    narrow = best_window(tokens(), 8192, 3, FLASH, most_bytes=wide.resident_bytes // 2)
    assert narrow.window < wide.window
    assert narrow.resident_bytes <= wide.resident_bytes // 2
    assert narrow.seconds >= wide.seconds


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="no feed-forward block") as caught:
        bundle_neurons(normal(8, 32), normal(31, 8))
    assert caught.value.code == "bundle-shapes"
    with pytest.raises(InputError, match="no bundles of width 7"):
        unbundle_neurons(normal(4, 24), 7)
    with pytest.raises(InputError) as caught:
        neuron_reads([], 100, 2, FLASH)
    assert caught.value.code == "window"
    with pytest.raises(InputError, match="one token take"):
        best_window(tokens(), 8192, 3, FLASH, most_bytes=1000)
