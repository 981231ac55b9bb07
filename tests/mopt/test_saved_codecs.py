"""Smaller forms of saved values: exact ones give back every bit, lossy ones stay within a step."""

from __future__ import annotations

import pytest
import torch

from mopt.saved_codecs import GROUP, restore, squeeze, squeezed_bytes


@pytest.mark.parametrize("shape", [(7,), (3, 129), (2, 5, 1031)])
def test_truth_values_take_a_bit_and_come_back(shape: tuple[int, ...]) -> None:
    value = torch.rand(shape) < 0.3
    packed = squeeze(value, "bits")
    assert packed.numel() == -(-value.numel() // 8)
    assert torch.equal(restore(packed, "bits", list(shape), torch.bool), value)


@pytest.mark.parametrize("form", ["int16", "int32"])
def test_places_come_back(form: str) -> None:
    value = torch.randint(0, 1 << 15, (4, 33))
    packed = squeeze(value, form)
    assert packed.numel() == squeezed_bytes(form, value.numel())
    assert torch.equal(restore(packed, form, [4, 33], torch.int64), value)


@pytest.mark.parametrize(("form", "levels"), [("int8", 255), ("int4", 15)])
@pytest.mark.parametrize("count", [5, GROUP, 600 * GROUP + 3])
def test_levels_are_within_half_a_step(form: str, levels: int, count: int) -> None:
    value = torch.randn(count) * torch.linspace(0.1, 30, count)
    packed = squeeze(value, form)
    assert packed.numel() == squeezed_bytes(form, count)
    found = restore(packed, form, [count], torch.float32)
    for begin in range(0, count, GROUP):
        group, back = value[begin : begin + GROUP], found[begin : begin + GROUP]
        step = (group.max() - group.min()) / levels
        assert (group - back).abs().max() <= 0.5 * step + 1e-5 * group.abs().max()


def test_fp8_keeps_three_bits_of_the_fraction() -> None:
    value = torch.randn(10 * GROUP)
    found = restore(squeeze(value, "fp8"), "fp8", [10 * GROUP], torch.float32)
    # E4M3 has steps of 1/8 within a power of two; what is far below the largest value is coarser.
    assert ((found - value).abs() <= value.abs() / 16 + 1e-4).all()


def test_a_constant_group_comes_back() -> None:
    value = torch.full((GROUP,), 3.5)
    for form in ("int8", "int4"):
        assert torch.equal(restore(squeeze(value, form), form, [GROUP], torch.float32), value)
    assert not restore(squeeze(torch.zeros(9), "fp8"), "fp8", [9], torch.float32).any()


@pytest.mark.parametrize("form", ["bits", "int8", "int4", "fp8"])
def test_the_shapes_of_the_operators_are_those_of_their_results(form: str) -> None:
    value = torch.rand(3, 200) < 0.5 if form == "bits" else torch.randn(3, 200)
    arguments = (squeeze(value, form), form, [3, 200], value.dtype)
    torch.library.opcheck(torch.ops.mopt.squeeze.default, (value, form))
    torch.library.opcheck(torch.ops.mopt.restore.default, arguments)
