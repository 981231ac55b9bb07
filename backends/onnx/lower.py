"""The ONNX Runtime backend: ``model.onnx`` with ONNX Runtime's own kernels, and its runner."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from mopt.backends.onnx.apart import ApartRunner
from mopt.backends.onnx.export import export_onnx
from mopt.backends.onnx.finish import name_sizes
from mopt.backends.onnx.model_file import write_model
from mopt.backends.onnx.session import open_session, probe_file
from mopt.pass_base import Skip
from mopt.program import Program, site_of
from mopt.signature import Signature

MODEL = "model.onnx"
DATA = "model.onnx.data"
# Int4 weights become floats of eight times their size, which the runtime holds up to three times.
_PROBE_BYTES, _PROBE_TIMES = 1 << 30, 24
# A protobuf message ends at 2 GiB, and reading a large one takes three times its bytes;
# weights in a file beside it are written one by one and mapped when they are read.
EXTERNAL_FROM_BYTES = 1 << 28


class OnnxModelRunner:
    """Runs a lowered model in ONNX Runtime: tensors or arrays in, arrays out."""

    def __init__(
        self, folder: Path, signature: Signature, threads: int | None, apart: bool
    ) -> None:
        self._session = (
            ApartRunner(folder / MODEL, threads) if apart
            else open_session(folder / MODEL, threads=threads)
        )  # fmt: skip
        self._names = [spec.name for spec in signature.inputs]

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Output arrays for flat inputs in signature order."""
        return self._session.run([_as_array(value) for value in inputs])

    def close(self) -> None:
        """Free the session."""
        self._session.close()


class OnnxBackend:
    """Lowers through PyTorch's exporter and the rewrites beside this file."""

    name = "onnx"

    def unsupported(self, program: Program) -> list[Skip]:
        """Calls that have no translation, and dtypes that ONNX Runtime's CPU kernels lack."""
        from mopt.backends.onnx.translate import translation_table

        known = translation_table()
        found = []
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            target = node.target
            if isinstance(target, torch._ops.OpOverload) and target.namespace == "mopt":
                if target not in known:
                    found.append(Skip(site_of(node), f"{target} has no ONNX translation"))
            elif isinstance(target, torch._ops.HigherOrderOperator):
                found.append(Skip(site_of(node), f"control flow {target} is not lowered"))
        return found

    def lower(self, program: Program, folder: Path, signature: Signature) -> list[str]:
        """Write ``model.onnx``, with the weights beside it from 256 MiB on."""
        model = export_onnx(
            program.graph_module,
            program.args,
            program.kwargs,
            program.dynamic_shapes,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
        )
        name_sizes(model, signature)
        initializers = list(model.graph.initializers.values())
        weights = sum(v.const_value.nbytes for v in initializers if v.const_value is not None)
        if weights >= EXTERNAL_FROM_BYTES:
            ir.save(model, folder / MODEL, external_data=DATA, size_threshold_bytes=1024)
        else:
            write_model(model, folder / MODEL)
        # The exporter's rewrite rules remember the last graph they saw, for as long as the process
        # lives: it need not keep a second copy of the weights.
        for value in initializers:
            value.const_value = None
        return [MODEL, DATA] if weights >= EXTERNAL_FROM_BYTES else [MODEL]

    def open(
        self, folder: Path, signature: Signature, *, threads: int | None, apart: bool = False
    ) -> OnnxModelRunner:
        """Load a lowered model, ``apart`` a large one in a process of its own."""
        apart = apart and (folder / DATA).exists()
        return OnnxModelRunner(folder, signature, threads, apart)

    def probe(self, folder: Path) -> None:
        """Check a model and load it once in a child, which it may crash or fill."""
        size = sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))
        probe_file(folder, max_memory=_PROBE_BYTES + _PROBE_TIMES * size)

    def bench_command(self, folder: Path, inputs: Path, *, threads: int | None) -> list[str]:
        """Time the model in a fresh process that does not import torch."""
        return [
            sys.executable, "-m", "mopt.backends.onnx.session",
            "--bench", str(folder), "--inputs", str(inputs), "--threads", str(threads or 0),
        ]  # fmt: skip


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous().numpy()
    return np.ascontiguousarray(value)


BACKEND = OnnxBackend()
