"""The packed layouts against ONNX Runtime's own kernels, and our rounding against its quantizer."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits
from torch import Tensor

from mopt import ops
from mopt.formats.int_blocks import IntBlocks
from mopt.ops import dequantize_blocks


def matmul_nbits(fmt: IntBlocks, weight: Tensor, x: Tensor, level: int) -> Tensor:
    """What ONNX Runtime computes from a weight we packed."""
    encoded = fmt.encode(weight).tensors
    names = ["codes", "scales"] + (["zero_points"] if "zero_points" in encoded else [])
    rows, columns = weight.shape
    node = helper.make_node(
        "MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", K=columns, N=rows,
        bits=fmt.bits, block_size=fmt.block(columns), accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(encoded[name].numpy(), name) for name in names],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("group", "columns"), [(32, 200), (16, 48), (128, 256), (0, 200), (64, 64)]
)
def test_matmul_nbits_reads_our_layout(
    bits: int, asymmetric: bool, group: int, columns: int
) -> None:
    fmt = IntBlocks(bits, group, asymmetric)
    weight, x = torch.randn(24, columns), torch.randn(3, columns)
    expected = x @ fmt.decode(fmt.encode(weight)).t()
    exact = matmul_nbits(fmt, weight, x, level=0)
    assert float((exact - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    # Level 4 rounds the input to 8 bits per row and block; so does the reference of the operator.
    fast = matmul_nbits(fmt, weight, x, level=4)
    assert float((fast - expected).norm() / expected.norm()) < 1e-2
    tensors = fmt.encode(weight).tensors
    reference = torch.ops.mopt.linear_nbits(
        x, tensors["codes"], tensors["scales"], tensors.get("zero_points"), None, bits, columns,
        "int8",
    )  # fmt: skip
    assert float((fast - reference).norm() / expected.norm()) < 1e-2


def onnxruntime_error(weight: Tensor, group: int, symmetric: bool) -> float:
    """Squared error of ONNX Runtime's MatMulNBitsQuantizer, from the function it calls."""
    rows, columns = weight.shape
    blocks = -(-columns // group)
    codes = np.zeros((rows, blocks, group // 2), dtype=np.uint8)
    scales = np.zeros((rows, blocks), dtype=np.float32)
    zeros = np.zeros((rows, (blocks + 1) // 2), dtype=np.uint8)
    quantize_matmul_4bits(
        codes, np.ascontiguousarray(weight.numpy().T), scales.reshape(-1), zeros.reshape(-1),
        group, rows, columns, symmetric,
    )  # fmt: skip
    decoded = dequantize_blocks(
        torch.from_numpy(codes), torch.from_numpy(scales),
        None if symmetric else torch.from_numpy(zeros), 4, columns,
    )  # fmt: skip
    return float((decoded - weight).square().sum())


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("heavy_tails", [False, True])
def test_the_mse_search_beats_onnxruntimes_quantizer(
    group: int, asymmetric: bool, heavy_tails: bool
) -> None:
    weight = torch.randn(128, 512)
    if heavy_tails:
        weight = weight / (torch.rand(128, 512) + 0.2)
    fmt = IntBlocks(4, group, asymmetric)
    decoded = fmt.decode(fmt.encode(weight))
    ours = float((decoded - weight).square().sum())
    assert ours < 0.95 * onnxruntime_error(weight, group, not asymmetric)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_reference_decodes_some_rows_at_a_time(
    asymmetric: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = IntBlocks(4, 32, asymmetric)
    weight, x = torch.randn(23, 64), torch.randn(2, 3, 64)
    bias = torch.randn(23) if biased else None
    tensors = fmt.encode(weight).tensors

    def computed() -> Tensor:
        return torch.ops.mopt.linear_nbits(
            x, tensors["codes"], tensors["scales"], tensors.get("zero_points"), bias, 4, 64, "float"
        )

    whole = computed()
    monkeypatch.setattr(ops, "_DECODED_TOGETHER", 5 * 64)
    torch.testing.assert_close(computed(), whole, rtol=1e-6, atol=1e-6)
    expected = torch.nn.functional.linear(x, fmt.decode(fmt.encode(weight)), bias)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
