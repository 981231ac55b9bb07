"""Each mopt:: operator means in ONNX Runtime what its reference means in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mopt.ops as ops
from tests.backends.onnx.exported import Exported, dynamic, export

# Float32 sums of up to 300 products, added up in another order.
FLOAT_TOLERANCE = 1e-6


class LinearNBits(nn.Module):
    def __init__(
        self, bits: int, block: int, width: int, *, zero_points: bool, activations: str
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(bits * block + width)
        rows, blocks = 6, -(-width // block)
        codes = torch.randint(2**bits, (rows, blocks, block), generator=generator)
        zeros = torch.randint(2**bits, (rows, blocks), generator=generator)
        self.register_buffer("codes", ops.pack_bits(codes, bits))
        self.register_buffer("scales", torch.rand(rows, blocks, generator=generator) + 0.1)
        self.register_buffer(
            "zero_points", ops.pack_zero_points(zeros, bits) if zero_points else None
        )
        self.register_buffer("bias", torch.randn(rows, generator=generator))
        self.rest = (bits, width, activations)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mopt.linear_nbits(
            x, self.codes, self.scales, self.zero_points, self.bias, *self.rest
        )


class Side(nn.Module):
    """Layers that read the first features of one input, each with its own output."""

    def __init__(self, layers: list[LinearNBits]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x[..., : layer.rest[1]]) for layer in self.layers]


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_weights_mean_the_same(bits: int, zero_points: bool) -> None:
    """Odd numbers of blocks, a last block that is cut short, each with and without zero points."""
    layers = [
        LinearNBits(bits, block, width, zero_points=zero_points, activations="float")
        for block, width in ((32, 96), (16, 48), (64, 200), (128, 256))
    ]
    result = export(Side(layers), (torch.randn(3, 5, 256),), dynamic({0: "batch"}))
    assert result.error(torch.randn(1, 5, 256)) < FLOAT_TOLERANCE
    assert result.error(torch.randn(4, 5, 256)) < FLOAT_TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_activations_round_as_the_reference_does(bits: int) -> None:
    layer = LinearNBits(bits, 32, 96, zero_points=True, activations="int8")
    result = export(layer, (torch.randn(3, 96),), dynamic({0: "batch"}))
    assert result.error(torch.randn(2, 96)) < FLOAT_TOLERANCE
    assert accuracy_level(result) == 4


def test_four_bits_and_one_row_keep_float_activations_when_asked() -> None:
    layer = LinearNBits(4, 32, 96, zero_points=False, activations="float")
    result = export(layer, (torch.randn(1, 96),))
    assert accuracy_level(result) == 1


@pytest.mark.parametrize("columns", [192, 200])
@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize(("bits", "stored"), [(2, "UINT8"), (4, "INT4"), (8, "INT8")])
def test_codes_without_a_fast_kernel_become_a_float_product_at_load(
    bits: int, stored: str, zero_points: bool, columns: int
) -> None:
    layer = LinearNBits(bits, 32, columns, zero_points=zero_points, activations="float")
    result = export(layer, (torch.randn(3, columns),))
    assert result.operators()["MatMulNBits"] == 0
    assert set(result.kernels()) <= {"Gemm", "MatMul", "Add"}
    (codes,) = [
        value for name, value in result.model.graph.initializers.items() if name.endswith(".codes")
    ]
    assert codes.dtype is not None and codes.dtype.name == stored
    padded = -(-columns // 32) * 32
    assert codes.const_value is not None
    assert codes.const_value.nbytes == padded * layer.codes.shape[0] * bits // 8


class TwoCalls(nn.Module):
    """One weight in blocks, read by a kernel of codes and by a call that would widen it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LinearNBits(4, 32, 96, zero_points=False, activations="int8")

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        own = self.layer
        wide = torch.ops.mopt.linear_nbits(y, own.codes, own.scales, None, None, 4, 96, "float")
        return own(x), wide


def test_codes_that_are_also_read_as_they_are_stand_in_the_file_once() -> None:
    inputs = (torch.randn(2, 96), torch.randn(40, 96))
    result = export(TwoCalls(), inputs)
    assert result.operators()["MatMulNBits"] == 2
    assert sum("codes" in name for name in result.model.graph.initializers) == 1
    assert result.error(*inputs) < 0.01  # the second is rounded to 8 bits too


def accuracy_level(result: Exported) -> int:
    node = next(n for n in result.model.graph if n.op_type == "MatMulNBits")
    return node.attributes["accuracy_level"].as_int()


class DynamicInt8(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer(
            "codes", torch.randint(-127, 128, (24, 40), generator=generator).to(torch.int8)
        )
        self.register_buffer("scales", torch.rand(24, generator=generator) * 0.01)
        self.register_buffer("bias", torch.randn(24, generator=generator) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mopt.linear_dynamic_int8(x, self.codes, self.scales, self.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_int8_is_one_operator(bias: bool) -> None:
    result = export(DynamicInt8(bias=bias), (torch.randn(3, 5, 40),), dynamic({0: "batch"}))
    assert result.error(torch.randn(1, 5, 40)) < FLOAT_TOLERANCE
    assert result.error(torch.randn(2, 5, 40) * 100) < FLOAT_TOLERANCE
    assert result.operators() == {"DynamicQuantizeMatMul": 1}


class QuantizedTensor(nn.Module):
    def __init__(self, dtype: torch.dtype, channels: int | None) -> None:
        super().__init__()
        shape = () if channels is None else (channels,)
        self.register_buffer("scale", torch.full(shape, 0.05))
        self.register_buffer("zero", torch.full(shape, 3, dtype=dtype))
        self.axis = 0 if channels is None else 1

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.ops.mopt.quantize(x, self.scale, self.zero, self.axis)
        return torch.ops.mopt.dequantize(codes, self.scale, self.zero, self.axis)


@pytest.mark.parametrize("channels", [None, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_quantize_and_dequantize(dtype: torch.dtype, channels: int | None) -> None:
    """Exactly: ties, saturation at both ends, zero points."""
    x = torch.linspace(-9, 9, 4 * 50).reshape(50, 4)
    result = export(QuantizedTensor(dtype, channels), (x,), dynamic({0: "batch"}))
    assert result.error(x) == 0
    assert result.operators() == {"QuantizeLinear": 1, "DequantizeLinear": 1}


class Embedding(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.register_buffer(
            "codes", torch.randint(-127, 128, (50, 40), generator=generator).to(torch.int8)
        )
        self.register_buffer("scales", torch.rand(50, blocks, generator=generator))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.ops.mopt.embedding_int8(tokens, self.codes, self.scales)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_int8_embeddings_are_exact(blocks: int) -> None:
    tokens = torch.randint(50, (3, 7))
    result = export(Embedding(blocks), (tokens,), dynamic({0: "batch"}))
    assert result.error(tokens[:1]) == 0


class Half(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(24, 40).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ops.mopt.widen(self.weight, torch.float32)
        return nn.functional.linear(x, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_stay_half_in_the_file(dtype: torch.dtype) -> None:
    result = export(Half(dtype), (torch.randn(3, 40),), dynamic({0: "batch"}))
    assert result.error(torch.randn(2, 40)) < FLOAT_TOLERANCE
    weights = [v.const_value for v in result.model.graph.initializers.values()]
    assert [w.dtype.itemsize for w in weights if w is not None and w.size == 24 * 40] == [2]
