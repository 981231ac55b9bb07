"""Kernels in fewer channels: what that loses is known beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mopt.low_rank import decompose
from mopt.tucker import Tucker, decompose_kernel
from tests.passes.quantize.calibrated import correlated
from tests.tiny import normal


def rebuilt(found: Tucker, outputs: int, inputs: int, rounds: int = 3) -> Tensor:
    first, core, last = found.factors(outputs, inputs, rounds)
    flat = torch.einsum("pqw,qi,op->oiw", core.flatten(2), first, last)
    return flat.reshape(len(last), first.shape[1], *core.shape[2:])


@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (6, 10, 5), (8, 8, 1, 1), (4, 6, 2, 2, 3)])
def test_errors_are_those_that_were_predicted_and_bounded_by_both_spectra(
    shape: tuple[int, ...],
) -> None:
    weight = normal(*shape)
    found = decompose_kernel(weight)
    assert torch.allclose(rebuilt(found, *shape[:2]), weight.double())
    outputs, inputs = shape[0] // 2, shape[1] // 2
    error = float((rebuilt(found, outputs, inputs, 0) - weight).square().sum())
    assert error == pytest.approx(found.loss(outputs, inputs))
    spectra = [
        torch.linalg.svdvals(weight.double().movedim(axis, 0).flatten(1))[count:].square().sum()
        for axis, count in ((0, outputs), (1, inputs))
    ]
    assert error <= float(sum(spectra)) * (1 + 1e-9)
    refined = float((rebuilt(found, outputs, inputs) - weight).square().sum())
    _, core, _ = found.factors(outputs, inputs)
    assert refined <= error * (1 + 1e-9)
    assert refined == pytest.approx(found.size - float(core.square().sum()))


def test_weighing_by_the_inputs_gives_a_window_of_one_place_the_least_output_error() -> None:
    weight, rows = normal(10, 12, 1, 1), correlated(300, 12).double()
    moment = rows.t() @ rows / len(rows)
    best = decompose(weight.flatten(1), moment).loss(5)

    def error(found: Tucker) -> float:
        difference = (rebuilt(found, 5, 5) - weight).flatten(1)
        return float((rows @ difference.t()).square().sum() / len(rows))

    assert error(decompose_kernel(weight, moment)) == pytest.approx(best, rel=1e-6)
    assert error(decompose_kernel(weight)) > 1.2 * best


def test_three_convolutions_compute_what_the_rebuilt_kernel_does() -> None:
    weight, x = normal(9, 7, 3, 3), normal(2, 7, 11, 10).double()
    found = decompose_kernel(weight, torch.eye(7) + 0.1)
    first, core, last = found.factors(4, 3)
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)}
    y = F.conv2d(F.conv2d(x, first[..., None, None]), core, **geometry)
    y = F.conv2d(y, last[..., None, None])
    assert torch.allclose(y, F.conv2d(x, rebuilt(found, 4, 3), **geometry))
