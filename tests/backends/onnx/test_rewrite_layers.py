"""Norms, activations, int8 layers and convolutions reach ONNX Runtime's fast kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.backends.onnx.exported import dynamic, export, quantize_linears

TOLERANCE = 2e-6
SHAPES = dynamic({0: "batch", 1: "length"})


class HandRms(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.rand(24) + 0.5)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "rsqrt":
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        if self.spelling == "sqrt":
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * self.weight
        return F.rms_norm(x, (24,), self.weight, 1e-5)


@pytest.mark.parametrize("spelling", ["rsqrt", "sqrt", "operator"])
def test_rms_norm_is_one_kernel(spelling: str) -> None:
    result = export(HandRms(spelling), (torch.randn(2, 6, 24),), SHAPES)
    assert result.kernels() == {"RMSNormalization": 1}
    assert result.error(torch.randn(3, 5, 24)) < TOLERANCE


def test_mean_over_another_axis_is_not_a_norm() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * torch.ones(24)

    result = export(Other(), (torch.randn(2, 6, 24),), SHAPES)
    assert result.operators()["RMSNormalization"] == 0
    assert result.error(torch.randn(3, 5, 24)) < TOLERANCE


class Block(nn.Module):
    """Residual sum, norm, feed-forward with an activation."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(24)
        self.up = nn.Linear(24, 48)
        self.down = nn.Linear(48, 24)
        self.activation = activation

    def act(self, x: Tensor) -> Tensor:
        if self.activation == "gelu":
            return F.gelu(x)
        if self.activation == "tanh":
            return F.gelu(x, approximate="tanh")
        if self.activation == "written":
            return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))
        return F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.down(self.act(self.up(x))))
        return self.norm(x + self.down(self.act(self.up(x))))


@pytest.mark.parametrize(
    ("activation", "kernel"),
    [("gelu", "BiasGelu"), ("tanh", "FastGelu"), ("written", "FastGelu"), ("silu", "QuickGelu")],
)
def test_activations_are_fused_and_norms_stay_fast(activation: str, kernel: str) -> None:
    result = export(Block(activation), (torch.randn(2, 6, 24),), SHAPES)
    kernels = result.kernels()
    assert kernels[kernel] == 2
    assert kernels["LayerNormalization"] == 2
    assert kernels["SkipLayerNormalization"] == 0
    assert not {"Erf", "Tanh", "Sigmoid", "Transpose", "Reshape"} & set(kernels)
    assert result.error(torch.randn(3, 5, 24)) < TOLERANCE


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(24, 24), nn.Linear(24, 8, bias=False)
        self.out = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.q(x))) + self.k(x)


def test_int8_layers_share_the_quantization_of_their_input() -> None:
    result = export(Three(), (torch.randn(2, 6, 24),), SHAPES, edit=quantize_linears)
    assert result.operators() == {
        "DynamicQuantizeLinear": 1,
        "MatMulIntegerToFloat": 2,
        "DynamicQuantizeMatMul": 1,
        "Relu": 1,
        "Add": 1,
    }
    assert result.error(torch.randn(3, 5, 24)) < TOLERANCE
    stored = {v.name: list(v.shape) for v in result.model.graph.initializers.values()}
    assert stored["q_weight_codes"] == [24, 24]
    assert stored["k_weight_codes"] == [24, 8]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.side = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.side(x))


def test_float_convolutions_take_their_activation_and_sum_along() -> None:
    result = export(Residual(), (torch.randn(2, 8, 12, 12),), dynamic({0: "batch"}))
    kernels = result.kernels()
    assert kernels["Conv"] == 3
    assert not {"Relu", "Add"} & set(kernels)
    assert result.error(torch.randn(1, 8, 12, 12)) < TOLERANCE


def quantize_convolutions(graph_module: fx.GraphModule) -> None:
    """Static int8 around each convolution and sum: fixed ranges, which the parity does not need."""
    graph = graph_module.graph
    aten = torch.ops.aten

    def stored(name: str, tensor: Tensor) -> fx.Node:
        graph_module.register_buffer(name, tensor)
        return graph.get_attr(name)

    def through(value: fx.Node, codes: str) -> fx.Node:
        scale = stored(f"{codes}_scale", torch.tensor(0.04))
        lowest = 0 if value.target == aten.relu.default else 100
        zero = stored(f"{codes}_zero", torch.tensor(lowest, dtype=torch.uint8))
        quantized = graph.call_function(torch.ops.mopt.quantize.default, (value, scale, zero, 0))
        return graph.call_function(torch.ops.mopt.dequantize.default, (quantized, scale, zero, 0))

    for node in list(graph.nodes):
        if node.target == aten.conv2d.default:
            weight = graph_module.get_parameter(node.args[1].target).detach()
            steps = weight.abs().flatten(1).amax(1) / 127
            base = node.args[1].name
            with graph.inserting_before(node):
                rounded = torch.round(weight / steps[:, None, None, None])
                codes = stored(f"{base}_codes", rounded.to(torch.int8))
                scales = stored(f"{base}_scales", steps)
                zeros = stored(f"{base}_zeros", torch.zeros(len(steps), dtype=torch.int8))
                wide = graph.call_function(
                    torch.ops.mopt.dequantize.default, (codes, scales, zeros, 0)
                )
                read = through(node.args[0], f"{node.name}_in")
            node.args = (read, wide, *node.args[2:])
        elif node.target == aten.add.Tensor:
            with graph.inserting_before(node):
                node.args = tuple(through(a, f"{node.name}_{i}") for i, a in enumerate(node.args))
        elif node.target == aten.relu.default and node.args[0].target == aten.add.Tensor:
            users = list(node.users)
            with graph.inserting_before(users[0]):
                result = through(node, f"{node.name}_out")
            users[0].replace_input_with(node, result)


def test_static_int8_convolutions_stay_in_int8() -> None:
    x = torch.randn(2, 8, 12, 12)
    result = export(Residual(), (x,), dynamic({0: "batch"}), edit=quantize_convolutions)
    kernels = result.kernels()
    assert kernels["QLinearConv"] == 3
    assert kernels["QLinearAdd"] == 1
    assert kernels["Conv"] == kernels["Add"] == 0
    # One step of the output: a sum on the edge between two codes may fall either way.
    step = 0.04
    got = torch.from_numpy(result.run(x)[0])
    assert (got - result.graph_module(x)).abs().max() <= 2 * step + 1e-6


class Dequantized(nn.Module):
    """Two linears that share a weight of int8 codes with a scale per output channel."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("codes", torch.randint(-127, 128, (5, 7), generator=generator).char())
        self.register_buffer("scales", torch.rand(5, generator=generator) + 0.1)
        self.register_buffer("zeros", torch.zeros(5, dtype=torch.int8))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.ops.mopt.dequantize(self.codes, self.scales, self.zeros, 0)
        return F.linear(x, weight), F.linear(y, weight)


def test_codes_that_are_widened_and_transposed_are_stored_transposed() -> None:
    """Else ONNX Runtime has to fold them: six times as long to load, twice the memory."""
    inputs = (torch.randn(3, 2, 7), torch.randn(2, 4, 7))
    result = export(Dequantized(), inputs)
    assert result.operators()["Transpose"] == 0
    (codes,) = [value for name, value in result.model.graph.initializers.items() if "codes" in name]
    assert tuple(codes.shape or ()) == (7, 5)
    assert result.error(*inputs) < TOLERANCE


class Static(nn.Module):
    """A linear layer between decoded 8-bit values and weights, as quantize-static writes it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("step", torch.tensor(0.03))
        self.register_buffer("zero", torch.tensor(120, dtype=torch.uint8))
        self.register_buffer("codes", torch.randint(-127, 128, (8, 24), dtype=torch.int8))
        self.register_buffer("steps", torch.rand(8) * 0.01 + 0.001)
        self.register_buffer("zeros", torch.zeros(8, dtype=torch.int8))
        self.register_buffer("bias", torch.randn(8) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.ops.mopt.quantize(x, self.step, self.zero, 0)
        value = torch.ops.mopt.dequantize(codes, self.step, self.zero, 0)
        weight = torch.ops.mopt.dequantize(self.codes, self.steps, self.zeros, 0)
        return F.linear(value, weight, self.bias)


@pytest.mark.parametrize("shapes", [None, SHAPES], ids=["fixed sizes", "dynamic sizes"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_static_int8_layers_stay_integer_products(bias: bool, shapes: object) -> None:
    # With sizes known, ONNX Runtime makes a float Gemm of a product with a float bias.
    result = export(Static(bias), (torch.randn(2, 6, 24),), shapes)
    kernels = result.kernels()
    assert kernels["MatMulIntegerToFloat"] == 1
    assert not {"Gemm", "MatMul", "Add", "DequantizeLinear"} & set(kernels)
    assert result.error(torch.randn(2, 6, 24)) < TOLERANCE
