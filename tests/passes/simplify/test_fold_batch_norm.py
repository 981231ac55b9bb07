"""fold-batch-norm."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample, assert_near, outputs
from tests.tiny import Apply, normal, sample

IMAGE = normal(2, 4, 6, 6)
ROWS = normal(3, 4)
POINT = nn.Conv2d(4, 4, 1)
SAME = nn.Conv2d(4, 6, 3, padding="same")
GROUPED = nn.Conv2d(4, 6, 3, groups=2)
UPWARD = nn.ConvTranspose2d(4, 6, 2)


def chain(*layers: nn.Module, x: Tensor = IMAGE) -> Callable[[], Sample]:
    return lambda: sample(nn.Sequential(*copy.deepcopy(layers)), x, dynamic=True)


def conv_read_twice() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.norm(y) + y

    return sample(
        Apply(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)), IMAGE, dynamic=True
    )


def shared_conv(*, same_norm: bool) -> Callable[[], Sample]:
    """One convolution called twice, each time followed by a batch norm."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.second(m.conv(F.relu(m.first(m.conv(x)))))

    def make() -> Sample:
        first = nn.BatchNorm2d(4)
        second = first if same_norm else nn.BatchNorm2d(4)
        conv = nn.Conv2d(4, 4, 3, padding=1)
        return sample(Apply(forward, conv=conv, first=first, second=second), IMAGE, dynamic=True)

    return make


def weight_read_elsewhere() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) + m.conv.weight.sum()

    return sample(
        Apply(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)), IMAGE, dynamic=True
    )


def batch_statistics() -> Sample:
    """Without running statistics, batch norm uses those of the batch in eval mode too."""
    return sample(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), IMAGE
    )


def linear_over_time() -> Sample:
    """Batch norm over axis 1 of (N, T, C): not the channels of the linear layer."""
    return sample(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)), normal(2, 5, 4), dynamic=True)


def unbatched_image() -> Sample:
    """conv2d of (C, H, W), whose axis 1 is the height."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return F.batch_norm(m.conv(x), m.mean, m.running_var)

    members = {"mean": torch.zeros(6), "running_var": torch.ones(6)}
    return sample(Apply(forward, conv=nn.Conv2d(4, 8, 1), **members), normal(4, 6, 6))


def half_precision(dtype: torch.dtype) -> Callable[[], Sample]:
    def make() -> Sample:
        found = tiny.conv_bn_relu()
        return Sample(found.module.to(dtype), (found.inputs[0].to(dtype),), found.dynamic_shapes)

    return make


def no_variance() -> Sample:
    """Running variance -eps: the scale would be infinite; the input of zeros hides it."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return F.batch_norm(m.conv(x), m.mean, m.var, eps=0.25).isnan()

    members = {"mean": torch.zeros(4), "var": torch.full((4,), -0.25)}
    return Sample(Apply(forward, conv=nn.Conv2d(4, 4, 1), **members), (IMAGE,))


def small_variance_in_half() -> Sample:
    """A variance so small that weight / deviation exceeds 65504."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return F.batch_norm(m.conv(x), m.mean, m.var, eps=1e-12)

    conv = nn.Conv2d(4, 4, 1)
    nn.init.constant_(conv.weight, 1.0)
    nn.init.zeros_(conv.bias)
    members = {"mean": torch.zeros(4).half(), "var": torch.zeros(4).half()}
    return Sample(Apply(forward, conv=conv.half(), **members), (IMAGE.half() * 1e-4,))


CASES = [
    Case("conv-bn-relu", tiny.conv_bn_relu, changed=True),
    Case(
        "conv-bn-relu-in-place",
        chain(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        changed=True,
    ),
    Case("bias-and-groups", lambda: tiny.conv_bn_relu(groups=2, bias=True), changed=True),
    Case(
        "conv1d",
        chain(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), x=normal(2, 4, 8)),
        changed=True,
    ),
    Case(
        "conv3d-without-gamma",
        chain(nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6, affine=False), x=normal(2, 4, 3, 3, 3)),
        changed=True,
    ),
    Case(
        "transposed-in-groups",
        chain(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)),
        changed=True,
    ),
    Case("padding-by-name", chain(SAME, nn.BatchNorm2d(6)), changed=True),
    Case("linear", chain(nn.Linear(4, 6), nn.BatchNorm1d(6), x=ROWS), changed=True),
    Case("two-in-a-row", chain(POINT, nn.BatchNorm2d(4), nn.BatchNorm2d(4)), changed=True),
    Case("residual-blocks", tiny.small_cnn, changed=True),
    Case("shared-conv-same-norm", shared_conv(same_norm=True), changed=True),
    Case("before-a-linear", chain(nn.BatchNorm1d(4), nn.Linear(4, 6), x=ROWS), changed=True),
    Case("before-a-conv-in-groups", chain(nn.BatchNorm2d(4), GROUPED), changed=True),
    Case("bfloat16", half_precision(torch.bfloat16), changed=True),
    Case("float16", half_precision(torch.float16), changed=True),
    # ---- what must stay
    Case("no-batch-norm", tiny.mlp, changed=False),
    Case("conv-read-twice", conv_read_twice, changed=False, skipped="other readers"),
    Case("shared-conv-other-norms", shared_conv(same_norm=False), changed=False, skipped="shared"),
    Case("weight-read-elsewhere", weight_read_elsewhere, changed=False, skipped="other readers"),
    Case("batch-statistics", batch_statistics, changed=False, skipped="training mode"),
    Case("linear-over-time", linear_over_time, changed=False, skipped="axis 1"),
    Case("unbatched-image", unbatched_image, changed=False, skipped="no layer before"),
    Case("no-layer", chain(nn.BatchNorm2d(4), nn.ReLU()), changed=False, skipped="no layer before"),
    Case("before-padding", chain(nn.BatchNorm2d(4), SAME), changed=False, skipped="pads"),
    Case("before-transposed", chain(nn.BatchNorm2d(4), UPWARD), changed=False, skipped="pads"),
    Case("excluded", tiny.conv_bn_relu, options={"skip": "1"}, changed=False),
    Case("variance-of-minus-epsilon", no_variance, changed=False, skipped="NaN"),
    Case("too-large-for-float16", small_variance_in_half, changed=False, skipped="does not fit"),
]


def run(source: Sample) -> tuple[Program, Program]:
    program = source.capture()
    return program, Pipeline([make_pass("fold-batch-norm", {})]).run(program)


def test_the_folded_numbers_are_those_of_the_formula() -> None:
    source = tiny.conv_bn_relu(bias=True)
    conv, norm = source.module[0], source.module[1]
    _, result = run(source)
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    weights = result.weights()
    expected = (conv.weight.double() * factor[:, None, None, None]).float()
    torch.testing.assert_close(weights["0.weight_bn"], expected, rtol=1e-7, atol=0)
    shift = norm.bias.double() + (conv.bias.double() - norm.running_mean.double()) * factor
    torch.testing.assert_close(weights["0.bias_bn"], shift.float(), rtol=1e-7, atol=0)


def test_a_shared_convolution_stays_shared() -> None:
    program, result = run(shared_conv(same_norm=True)())
    assert result.steps[-1].stats == {"folded": 2}
    assert len([path for path in result.weights() if path.startswith("conv.weight")]) == 1
    assert result.size_bytes() < program.size_bytes()


def test_batch_norm_of_a_module_in_training_is_refused() -> None:
    source = tiny.conv_bn_relu()
    program = source.capture()
    for node in program.nodes:
        if "batch_norm" in str(node.target):
            node.args = (*node.args[:5], True, *node.args[6:])
    program.refresh()
    result = Pipeline([make_pass("fold-batch-norm", {})]).run(program)
    (skip,) = result.steps[-1].skipped
    assert skip.reason.startswith("it is in training mode")
    assert skip.site.startswith("1")


@pytest.mark.parametrize("seed", range(4))
def test_extreme_statistics_stay_close(seed: int) -> None:
    """Channels whose deviations differ by 10^6 lose no more than rounding in any channel."""
    source = tiny.conv_bn_relu()
    norm = source.module[1]
    with torch.no_grad():
        spread = 10.0 ** torch.linspace(-6, 6, norm.num_features)
        norm.running_var.copy_(spread[torch.randperm(len(spread))])
    program, result = run(source)
    args = (normal(5, 4, 6, 6, seed=seed),)
    for channel in range(norm.num_features):
        before = [outputs(program, args, {})[0][:, channel]]
        after = [outputs(result, args, {})[0][:, channel]]
        # 36 products per output, each off by half an epsilon, with cancellation
        assert_near(before, after, tolerance=5e-6, what=f"channel {channel}")
