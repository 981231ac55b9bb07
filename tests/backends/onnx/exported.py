"""A module exported to ONNX, run in ONNX Runtime and looked at before and after its optimizer."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import mopt.ops  # noqa: F401  (registers the operators)
from mopt.backends.onnx.export import export_onnx
from mopt.backends.onnx.options import SESSION_CONFIG

ort.set_default_logger_severity(3)

Edit = Callable[[fx.GraphModule], None]


@dataclass(frozen=True)
class Exported:
    """An ONNX model beside the graph it came from."""

    graph_module: fx.GraphModule
    model: ir.Model
    serialized: bytes

    def operators(self) -> Counter[str]:
        """How often each operator stands in the file."""
        return Counter(node.op_type for node in self.model.graph)

    def kernels(self) -> Counter[str]:
        """How often each operator is left after ONNX Runtime's optimizer, with our options."""
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "optimized.onnx")
            self.session(path)
            graph = onnx.load(path).graph
        return Counter(node.op_type for node in graph.node)

    def session(self, optimized_path: str | None = None) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        if optimized_path is not None:
            options.optimized_model_filepath = optimized_path
        for key, value in SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)
        return ort.InferenceSession(self.serialized, options, providers=["CPUExecutionProvider"])

    def run(self, *inputs: Tensor) -> list[np.ndarray[Any, Any]]:
        session = self.session()
        names = [port.name for port in session.get_inputs()]
        arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [np.asarray(y) for y in session.run(None, arrays)]

    def error(self, *inputs: Tensor) -> float:
        """The largest difference to the graph in torch, relative to the largest output number."""
        with torch.no_grad():
            expected = pytree.tree_leaves(self.graph_module(*inputs))
        return max(
            float(np.abs(y - e.numpy()).max() / max(np.abs(e.numpy()).max(), 1e-30))
            for y, e in zip(self.run(*inputs), expected, strict=True)
        )


def captured(module: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Any) -> fx.GraphModule:
    exported = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic_shapes)
    graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    return graph_module


def export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    dynamic_shapes: Any = None,
    *,
    edit: Edit | None = None,
) -> Exported:
    """Capture, change the graph with ``edit``, and export."""
    graph_module = captured(module, inputs, dynamic_shapes)
    if edit is not None:
        edit(graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
    model = export_onnx(graph_module, inputs, {}, dynamic_shapes)
    serialized = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return Exported(graph_module, model, serialized)


def dynamic(*ranks: dict[int, str], largest: int = 4096) -> tuple[dict[int, Any], ...]:
    """Dynamic shapes for positional inputs from ``{axis: name}``; equal names are equal sizes."""
    dims: dict[str, Any] = {}
    return tuple(
        {
            axis: dims.setdefault(name, torch.export.Dim(name, min=1, max=largest))
            for axis, name in rank.items()
        }
        for rank in ranks
    )


def quantize_linears(graph_module: fx.GraphModule) -> None:
    """Every linear layer in dynamic int8, per output channel."""
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target != torch.ops.aten.linear.default:
            continue
        weight = graph_module.get_parameter(node.args[1].target).detach()
        scale = weight.abs().amax(1) / 127
        tensors = {
            "codes": torch.round(weight / scale[:, None]).to(torch.int8),
            "scales": scale,
        }
        with graph_module.graph.inserting_before(node):
            inserted = []
            for kind, tensor in tensors.items():
                name = f"{node.args[1].target.replace('.', '_')}_{kind}"
                graph_module.register_buffer(name, tensor)
                inserted.append(graph_module.graph.get_attr(name))
            bias = node.args[2] if len(node.args) > 2 else None
            new = graph_module.graph.call_function(
                torch.ops.mopt.linear_dynamic_int8.default, (node.args[0], *inserted, bias)
            )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph_module.graph.erase_node(node)
