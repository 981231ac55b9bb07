"""quantize-static."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import mopt.ops  # noqa: F401  (registers the operators)
from mopt.calibration import Calibration
from mopt.errors import PassError
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program, iter_calls
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.tiny import Apply, normal, sample

quantize = torch.ops.mopt.quantize.default
dequantize = torch.ops.mopt.dequantize.default
aten = torch.ops.aten


def convolutions(function: Callable[..., Any], **members: nn.Module) -> Sample:
    """A model on images (2, 4, 8, 8) with a dynamic batch."""
    return sample(Apply(function, **members), normal(2, 4, 8, 8), dynamic=True)


def conv(inputs: int = 4, outputs: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def chain() -> Sample:
    """conv, relu, max_pool, conv, relu6, average, flatten, linear."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(m.first(x)), 2)
        x = F.adaptive_avg_pool2d(F.relu6(m.second(x)), 1)
        return m.head(x.flatten(1))

    return convolutions(forward, first=conv(), second=conv(4, 8), head=nn.Linear(8, 5))


def residual() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        x = F.relu(m.first(x))
        return m.third(F.relu(m.second(x) + x))

    return convolutions(forward, first=conv(), second=conv(), third=conv())


def in_place_residual() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        x = F.relu(m.first(x), inplace=True)
        y = m.second(x)
        y += x
        return m.third(F.relu_(y))

    return convolutions(forward, first=conv(), second=conv(), third=conv())


def concatenation() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        parts = [F.relu(m.first(x)), m.second(x), torch.sigmoid(x)]
        return m.third(torch.cat(parts, dim=1))

    return convolutions(forward, first=conv(), second=conv(), third=conv(12, 4))


def attention_like() -> Sample:
    """Softmax, layer norm and GELU read floats."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        x = m.norm(x)
        x = x + m.out(torch.softmax(m.q(x) @ m.k(x).transpose(1, 2), -1) @ m.v(x))
        return m.down(F.gelu(m.up(x)))

    members = {name: nn.Linear(16, 16) for name in ("q", "k", "v", "out")}
    ends = {"norm": nn.LayerNorm(16), "up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}
    return sample(Apply(forward, **members, **ends), normal(2, 6, 16), dynamic=True)


def transposed() -> Sample:
    layers = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(4, 4, 1))
    return sample(layers, normal(2, 4, 8, 8), dynamic=True)


def only_transposed() -> Sample:
    return sample(nn.ConvTranspose2d(4, 4, 2, stride=2), normal(2, 4, 8, 8), dynamic=True)


def one_dimensional() -> Sample:
    layers = nn.Sequential(nn.Conv1d(4, 8, 3, padding="same"), nn.ReLU(), nn.Conv1d(8, 2, 1))
    return sample(layers, normal(2, 4, 16), dynamic=True)


def dead_and_constant_channels() -> Sample:
    """Channels without weights but with a bias, and an input that is always zero."""
    made = sample(nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 4)), normal(2, 4, 8, 8))
    first = made.module[0]
    with torch.no_grad():
        first.weight[0] = 0
        first.bias[0] = 3.0
        first.weight[1] = 0
        first.bias[1] = -1.0
        first.weight[2] = 1e-9 * first.weight[2].sign()
        first.bias[2] = 2.0
    return made


def float16() -> Sample:
    made = sample(nn.Linear(16, 8), normal(2, 16))
    return Sample(made.module.half(), (made.inputs[0].half(),))


def calibrated(source: Callable[[], Sample], batches: int = 3) -> dict[str, Any]:
    """Arguments of a Case: inputs like the example's, the example first."""

    def data() -> Calibration:
        program = source().capture()
        more = [
            tuple(normal(*x.shape, seed=seed).to(x.dtype) for x in program.args)
            for seed in range(1, batches)
        ]
        return Calibration([program.args, *more], program)

    return {"source": source, "calibration": data}


# Each 8-bit value is off by up to half of 1/255 of its range, each layer adds that of its weights:
# about 1 % of the largest output per layer passed, since outputs near zero do not count for less.
CASES = [
    Case("chain", changed=True, tolerance=0.04, **calibrated(chain)),
    Case("chain-int8", changed=True, tolerance=0.05, options={"activations": "int8"},
         **calibrated(chain)),
    Case("chain-percentile", changed=True, tolerance=0.05, options={"calibration": "percentile"},
         **calibrated(chain)),
    Case("chain-entropy", changed=True, tolerance=0.15, options={"calibration": "entropy"},
         **calibrated(chain)),
    Case("chain-min-max", changed=True, tolerance=0.05, options={"calibration": "min-max"},
         **calibrated(chain)),
    Case("chain-moving-average", changed=True, tolerance=0.1,
         options={"calibration": "moving-average"}, **calibrated(chain)),
    Case("chain-reduced", changed=True, tolerance=0.05, options={"reduce_range": True},
         **calibrated(chain)),
    Case("chain-float-ends", changed=True, tolerance=0.03, skipped="keep_first is set",
         options={"keep_first": True, "keep_last": True}, **calibrated(chain)),
    Case("residual", changed=True, tolerance=0.05, **calibrated(residual)),
    Case("in-place-residual", changed=True, tolerance=0.05, **calibrated(in_place_residual)),
    Case("concatenation", changed=True, tolerance=0.05, **calibrated(concatenation)),
    Case("attention", changed=True, tolerance=0.05, **calibrated(attention_like)),
    Case("one-dimensional", changed=True, tolerance=0.04, **calibrated(one_dimensional)),
    Case("dead-channels", changed=True, tolerance=0.04, **calibrated(dead_and_constant_channels)),
    Case("transposed-stays", changed=True, tolerance=0.03,
         skipped="transposed convolutions have no int8 kernel", **calibrated(transposed)),
    Case("only-transposed", changed=False, skipped="no int8 kernel",
         **calibrated(only_transposed)),
    Case("float16-stays", changed=False, skipped="call model.float()", **calibrated(float16)),
    Case("excluded-by-name", changed=False, options={"skip": "*"}, **calibrated(chain)),
]  # fmt: skip


def run(source: Callable[[], Sample], data: list[Any] | None = None, **options: Any) -> Program:
    program = source().capture()
    context = PassContext(calibration=Calibration(data or [program.args], program))
    return Pipeline([make_pass("quantize-static", options)]).run(program, context)


def producer(node: Any) -> fx.Node:
    """The integer operation behind a dequantized value: what was quantized."""
    assert isinstance(node, fx.Node) and node.target is dequantize
    codes = node.args[0]
    assert isinstance(codes, fx.Node)
    return codes.args[0] if codes.target is quantize else codes


def test_integer_chains_have_codes_on_both_sides() -> None:
    result = run(chain)
    integer = [aten.conv2d.default, aten.max_pool2d.default, aten.flatten.using_ints]
    for call in iter_calls(result, *integer):
        assert call.args[0].target is dequantize
        assert {user.target for user in call.users} == {quantize}
    for call in iter_calls(result, aten.conv2d.default, aten.linear.default):
        assert [a.target for a in call.args[:3]] == [dequantize] * 3
    assert not list(
        iter_calls(result, aten.relu.default, aten.relu6.default, aten.hardtanh.default)
    )
    assert result.steps[-1].stats["folded_activations"] == 2


def test_reshaping_and_maximum_keep_the_scale() -> None:
    result = run(chain)
    for call in iter_calls(result, aten.max_pool2d.default, aten.flatten.using_ints):
        (after,) = call.users
        assert after.args[1:3] == call.args[0].args[1:3]


@pytest.mark.parametrize("source", [residual, in_place_residual])
def test_a_residual_sum_is_integer_on_both_sides(source: Callable[[], Sample]) -> None:
    result = run(source)
    (call,) = iter_calls(result, aten.add.Tensor, aten.add_.Tensor)
    assert all(producer(a).target is aten.conv2d.default for a in call.args)
    assert {user.target for user in call.users} == {quantize}
    # One pair of scale and zero point for the edge, whoever reads it.
    codes = [n for n in result.graph.nodes if n.target is quantize]
    for one in codes:
        assert {user.args[1:3] for user in one.users} == {one.args[1:3]}


def test_what_softmax_norms_and_gelu_read_stays_float() -> None:
    result = run(attention_like)
    targets = (aten.softmax.int, aten.layer_norm.default, aten.gelu.default, aten.matmul.default,
               aten.add.Tensor)  # fmt: skip
    for call in iter_calls(result, *targets):
        assert all(a.target is not dequantize for a in call.all_input_nodes)
    edges = [n for n in result.graph.nodes if n.target is quantize]
    # The norm (read by q, k and v), the attention's result, the residual sum and the GELU.
    assert len(edges) == 4


def test_a_linear_on_three_dimensions_keeps_its_float_bias() -> None:
    result = run(attention_like)
    for call in iter_calls(result, aten.linear.default):
        assert call.args[2].op == "get_attr"


def test_bias_codes_are_multiples_of_both_scales() -> None:
    result = run(chain)
    for call in iter_calls(result, aten.conv2d.default):
        x, weight, bias = call.args[:3]
        expected = result.weight(x.args[1]) * result.weight(weight.args[1])
        assert torch.equal(result.weight(bias.args[1]), expected)
        assert result.weight(bias.args[0]).dtype == torch.int32


def test_a_large_bias_on_tiny_weights_survives() -> None:
    program = dead_and_constant_channels().capture()
    result = run(dead_and_constant_channels)
    bias = [n for n in result.graph.nodes if n.op == "get_attr" and "bias_codes" in str(n.target)]
    scales = [n for n in result.graph.nodes if "bias_scales" in str(n.target)]
    kept = result.weight(bias[0]).double() * result.weight(scales[0]).double()
    original = program.weights()["0.bias"].double()
    assert torch.allclose(kept, original, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 2.5, -4.0])
def test_constant_activations(value: float) -> None:
    data = [(torch.full((2, 4, 8, 8), value),)]
    result = run(chain, data)
    steps = [t for name, t in result.weights().items() if name.endswith("_scale")]
    assert all(bool(torch.isfinite(t)) and float(t) > 0 for t in steps)
    expected = chain().capture().run(*data[0])
    assert torch.allclose(result.run(*data[0]), expected, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["min-max", "percentile", "mse", "entropy"])
def test_a_convolutional_net_keeps_its_answers(method: str) -> None:
    images = normal(64, 3, 8, 8, seed=5)
    program = tiny.small_cnn().capture()
    simple = Pipeline([make_pass("fold-batch-norm", {})]).run(program)
    context = PassContext(calibration=Calibration([(images[:32],)], simple))
    result = Pipeline([make_pass("quantize-static", {"calibration": method})]).run(simple, context)
    before, after = program.run(images[32:]), result.run(images[32:])
    top = before.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 0.05 * before.abs().max()
    assert int(clear.sum()) >= 8
    assert torch.equal(before.argmax(1)[clear], after.argmax(1)[clear])


def test_without_data_the_error_says_what_to_do() -> None:
    with pytest.raises(PassError, match=r"needs calibration data.*calibration=\[inputs") as caught:
        Pipeline([make_pass("quantize-static", {})]).run(chain().capture())
    assert caught.value.code == "pass-requires"


def test_a_part_of_a_model_with_islands_is_calibrated_on_its_own_inputs() -> None:
    class Looping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(x[0, 0].abs()) + 1):
                x = self.inner(x) * 10
            return x

    def source() -> Sample:
        return sample(Looping(), torch.full((2, 8), 2.0))

    result = run(source)
    (part,) = result.parts().values()
    scale = next(t for name, t in part.weights().items() if name.endswith("_scale"))
    assert result.steps[-1].stats["batches"] == 3
    assert float(scale) * 255 > 2.5, "later rounds of the loop have larger inputs than the model"
