"""quantize-static: one scale per weight, and biases that keep the means of outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.calibration import Calibration
from mopt.layers import find_layers
from mopt.pass_base import PassContext
from mopt.passes.quantize._means import correct_means
from mopt.program import Program
from tests.passes.quantize.calibrated import run_with
from tests.tiny import normal, sample


def unequal_channels() -> tuple[Program, list[Tensor]]:
    """Two convolutions whose output channels differ a hundredfold, with inputs that lie high."""
    made = sample(
        nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)),
        normal(2, 4, 8, 8),
        dynamic=True,
    )
    with torch.no_grad():
        made.module[0].weight.mul_(torch.logspace(-1, 1, 16)[:, None, None, None])
        made.module[0].bias.mul_(torch.logspace(-1, 1, 16))
        made.module[2].weight.mul_(torch.logspace(1, -1, 16)[None, :, None, None])
    return made.capture(), [normal(8, 4, 8, 8, seed=s).abs() for s in range(3)]


def test_one_scale_per_weight_loses_what_equalization_gives_back() -> None:
    program, data = unequal_channels()
    wanted = program.run(data[0])
    error = {}
    for name, passes in {
        "channel": [("quantize-static", {})],
        "tensor": [("quantize-static", {"weights": "tensor"})],
        "equalized": [("equalize-channels", {}), ("quantize-static", {"weights": "tensor"})],
    }.items():
        result = run_with(program, data, *passes)
        error[name] = float((result.run(data[0]) - wanted).square().mean())
        if name == "tensor":
            scales = next(t for p, t in result.weights().items() if p.endswith("0.weight_scales"))
            assert len(scales) == 16 and len(scales.unique()) == 1
    assert error["tensor"] > 5 * error["equalized"]
    assert error["tensor"] > 2 * error["channel"]


def test_corrected_biases_keep_the_means_of_outputs() -> None:
    program, data = unequal_channels()
    wanted = torch.cat([program.run(x) for x in data])
    off = []
    for corrects in (False, True):
        options = {"weights": "tensor", "correct_bias": corrects, "activations": "uint8"}
        result = run_with(program, data, ("quantize-static", options))
        found = torch.cat([result.run(x) for x in data])
        off.append(((found - wanted).mean((0, 2, 3)) / wanted.std((0, 2, 3))).abs().max())
    assert result.steps[-1].stats["corrected_biases"] == 2
    assert off[1] < 0.5 * off[0]


def test_means_are_measured_with_the_padding_of_convolutions() -> None:
    program, data = unequal_channels()
    layer = find_layers(program)[0]
    weight, bias = program.weight(layer.weight), program.constant(layer.calls[0].args[2])
    rounded = weight.div(0.5).round().mul(0.5)
    wanted = torch.cat([F.conv2d(x, weight, bias, padding=1) for x in data])
    context = PassContext(calibration=Calibration([(x,) for x in data], program))
    change = {layer: lambda at: (rounded - weight)[at]}
    assert correct_means(program, context, change) == 1
    corrected = program.constant(layer.calls[0].args[2])
    found = torch.cat([F.conv2d(x, rounded, corrected, padding=1) for x in data])
    assert torch.allclose(found.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-4)
