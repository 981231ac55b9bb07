"""Every model of the zoo builds, repeats, exports whole and computes sane numbers.

The fixture builds each model once and pytest groups the tests by model, so one is alive at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from mopt import models

if TYPE_CHECKING:
    from mopt.models._entry import ZooModel

FIXED_LENGTH = {"digits-cnn", "resnet50", "mobilenet-v2", "vit", "unet3d", "lstm"}


@dataclass(frozen=True)
class Built:
    model: ZooModel
    module: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@pytest.fixture(scope="module", params=[listing.name for listing in models.names()])
def built(request: pytest.FixtureRequest) -> Built:
    model = models.load(request.param)
    module = model.build()
    inputs = model.example_inputs()
    return Built(model, module, inputs, outputs_of(module, inputs))


@torch.no_grad()
def outputs_of(run: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    result = run(*inputs)
    return result if isinstance(result, tuple) else (result,)


def test_builds_in_eval_mode_on_the_cpu_in_float32(built: Built) -> None:
    assert not any(module.training for module in built.module.modules())
    for weight in built.module.parameters():
        assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")


def test_two_builds_are_equal_and_leave_the_random_state(built: Built) -> None:
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    again = built.model.build().state_dict()
    inputs = built.model.example_inputs()
    assert torch.equal(torch.get_rng_state(), before)
    first = built.module.state_dict()
    assert list(again) == list(first)
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    assert all(torch.equal(a, b) for a, b in zip(inputs, built.inputs, strict=True))


def test_outputs_are_finite_and_of_order_one(built: Built) -> None:
    for output in built.outputs:
        assert output.isfinite().all()
        assert 0.1 < output.std().item() < 10
    # Rows differ, so the input reaches the output.
    assert not torch.allclose(built.outputs[0][0], built.outputs[0][1], atol=0.01)


def test_calibration_has_the_example_shapes_and_repeats(built: Built) -> None:
    assert built.model.calibration is not None
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    batches = list(built.model.calibration())
    assert torch.equal(torch.get_rng_state(), before)
    assert 12 <= len(batches) <= 64
    wanted = [(x.shape, x.dtype) for x in built.inputs]
    assert all([(x.shape, x.dtype) for x in batch] == wanted for batch in batches)
    again = next(iter(built.model.calibration()))
    assert all(torch.equal(a, b) for a, b in zip(batches[0], again, strict=True))
    assert not torch.equal(batches[0][0], batches[1][0])


def test_exports_whole_and_runs_at_other_sizes(built: Built) -> None:
    assert built.model.dynamic_shapes is not None
    shapes = built.model.dynamic_shapes()
    exported = torch.export.export(built.module, built.inputs, dynamic_shapes=shapes, strict=False)
    assert {name.removeprefix("p_") for name in exported.state_dict} >= set(
        dict(built.module.named_parameters())
    )
    others = tuple(
        resized(tensor, dims) for tensor, dims in zip(built.inputs, shapes.values(), strict=True)
    )
    assert others[0].shape[0] == built.inputs[0].shape[0] + 1
    assert (others[0].shape[1:] == built.inputs[0].shape[1:]) == (built.model.name in FIXED_LENGTH)
    run = exported.module()
    for rows in (others[0].shape[0], 1):
        fed = tuple(tensor[:rows] for tensor in others)
        # The same operators in the same order: only the kernels' choices by alignment may differ.
        for got, wanted in zip(outputs_of(run, fed), outputs_of(built.module, fed), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def resized(tensor: Tensor, dims: dict[int, Any]) -> Tensor:
    """One row more, and half of every other dynamic dimension."""
    tensor = torch.cat((tensor, tensor[:1]))
    for dim in dims:
        if dim != 0:
            tensor = tensor.narrow(dim, 0, tensor.shape[dim] // 2)
    return tensor
