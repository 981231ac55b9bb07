"""From how many rows on a product with weights in blocks is slower than one with floats.

    python -m benchmarks.block_kernels [--threads 2]

ONNX Runtime's MatMulNBits beside MatMul, sessions without spinning threads in one process, calls
in turn, medians. ``IntBlocks.keeps_codes`` goes by this table.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

SHAPES = ((256, 688), (768, 768), (768, 3072), (2048, 2048), (4096, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
# bits, group, accuracy level: 4 rounds activations to 8 bits, 1 keeps floats
BLOCKS = {"int4-g32": (4, 32, 4), "int4-g128": (4, 128, 4), "int8-g32": (8, 32, 4),
          "int4-g32-afloat": (4, 32, 1)}  # fmt: skip


def main() -> None:
    """Measure and print a Markdown table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    print("| inputs x outputs | rows | float, ms | " + " | ".join(BLOCKS) + " |")
    print("|---|--:|--:|" + "--:|" * len(BLOCKS))
    for inputs, outputs in SHAPES:
        sessions = [session(inputs, outputs, None, threads)]
        sessions += [session(inputs, outputs, block, threads) for block in BLOCKS.values()]
        for rows in ROWS:
            whole, *others = measured(sessions, rows, inputs, outputs)
            cells = " | ".join(f"{other / whole:.2f}x" for other in others)
            name = f"{inputs} x {outputs}"
            print(f"| {name} | {rows} | {1e3 * whole:.3f} | {cells} |", flush=True)


def session(
    inputs: int, outputs: int, block: tuple[int, int, int] | None, threads: int
) -> ort.InferenceSession:
    """One product, with float weights or with codes."""
    random = np.random.default_rng(0)
    if block is None:
        stored = {"w": random.standard_normal((inputs, outputs), dtype=np.float32)}
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
    else:
        bits, group, accuracy = block
        shape = (outputs, inputs // group, group * bits // 8)
        stored = {
            "codes": random.integers(0, 255, shape, dtype=np.uint8),
            "scales": np.full(outputs * inputs // group, 0.01, np.float32),
        }
        node = helper.make_node(
            "MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft", K=inputs, N=outputs,
            bits=bits, block_size=group, accuracy_level=accuracy,
        )  # fmt: skip
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model.SerializeToString(), options)


def measured(
    sessions: list[ort.InferenceSession], rows: int, inputs: int, outputs: int
) -> list[float]:
    """Median seconds of each, called in turn."""
    x = {"x": np.random.default_rng(1).standard_normal((rows, inputs), dtype=np.float32)}
    for one in sessions:
        one.run(None, x)
    samples: list[list[float]] = [[] for _ in sessions]
    for _ in range(max(3, min(40, int(1e9 / (rows * inputs * outputs))))):
        for one, taken in zip(sessions, samples, strict=True):
            started = time.perf_counter()
            one.run(None, x)
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in samples]


if __name__ == "__main__":
    main()
