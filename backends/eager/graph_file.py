"""A graph as data: JSON over a list of allowed operators, weights beside it in safetensors.

Reading one builds an ``fx.GraphModule`` that takes and returns flat lists. Nothing in the file is
looked up by attribute walk except names on the lists of ``operators.py`` and ``mopt::`` operators.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

import mopt.ops
from mopt.backends.eager.operators import ATEN, PYTHON
from mopt.errors import ArtifactError, quote
from mopt.program import Program

SCHEMA = 1
_MOPT_OPERATORS = mopt.ops.OPERATORS
_MODULES = {"_operator": operator, "math": math, "torch": torch}


def operator_name(target: Any) -> str | None:
    """How a call's target is written in the file, or None when it is not allowed."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        overload = target._overloadname
        if (namespace == "aten" and name in ATEN) or (
            namespace == "mopt" and name in _MOPT_OPERATORS
        ):
            return f"{namespace}::{name}.{overload}"
        return None
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    return name if name in PYTHON else None


def write_graph(program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON-like graph and the weights it reads, shared ones once."""
    nodes: list[dict[str, Any]] = []
    weights: dict[str, Tensor] = {}
    names: dict[tuple[int, int, tuple[int, ...]], str] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and not node.users:
            continue
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "get_attr":
            tensor = program.weight(node)
            key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(),
                   tuple(tensor.shape))  # fmt: skip
            stored = names.setdefault(key, str(node.target)) if tensor.numel() else str(node.target)
            weights.setdefault(stored, tensor.contiguous())
            entry["target"] = stored
            if not tensor.is_contiguous() and _is_channels_last(tensor):
                entry["memory_format"] = "channels_last"
            if program.requires_grad(node):
                entry["requires_grad"] = True
        elif node.op == "call_function":
            entry["target"] = operator_name(node.target)
            entry["args"] = [_encode(a) for a in node.args]
            if node.kwargs:
                entry["kwargs"] = {k: _encode(v) for k, v in node.kwargs.items()}
        elif node.op == "output":
            entry["args"] = [_encode(a) for a in node.args[0]]
        nodes.append(entry)
    return {"schema": SCHEMA, "nodes": nodes}, weights


def read_graph(data: Any, weights: dict[str, Tensor], *, as_stored: bool = False) -> fx.GraphModule:
    """The graph of a file whose JSON was parsed with limits. Raises ArtifactError.

    ``as_stored`` leaves weights in the layout of the file; nodes say what theirs is.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ArtifactError("the graph file has another schema", code="graph-schema")
    root = torch.nn.Module()
    for index, tensor in enumerate(weights.values()):
        root.register_buffer(f"w{index}", tensor)
    attribute = {name: f"w{index}" for index, name in enumerate(weights)}
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    entries = data.get("nodes")
    if not isinstance(entries, list) or not entries:
        raise ArtifactError("the graph file has no nodes", code="malformed-graph-file")
    for entry in entries:
        try:
            _read_node(entry, graph, root, known, attribute, as_stored)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"malformed graph node {quote(entry)}", code="malformed-graph-file"
            ) from error
    return fx.GraphModule(root, graph)


def _read_node(
    entry: dict[str, Any],
    graph: fx.Graph,
    root: torch.nn.Module,
    known: dict[str, fx.Node],
    attribute: dict[str, str],
    as_stored: bool,
) -> None:
    kind, name = entry["op"], entry["name"]
    if not isinstance(name, str) or name in known:
        raise ValueError("duplicate or bad name")
    if kind == "placeholder":
        node = graph.placeholder(f"input_{len(known)}")
    elif kind == "get_attr":
        node = graph.get_attr(attribute[entry["target"]])
        node.meta["stored"] = entry["target"]
        node.meta["channels_last"] = entry.get("memory_format") == "channels_last"
        if node.meta["channels_last"] and not as_stored:
            tensor = root.get_buffer(attribute[entry["target"]])
            last = tensor.contiguous(memory_format=torch.channels_last)
            root.register_buffer(attribute[entry["target"]], last)
        # Torch picks another matmul kernel for a weight that could have a gradient.
        if entry.get("requires_grad") is True:
            node.meta["requires_grad"] = True
            root.get_buffer(attribute[entry["target"]]).requires_grad_(True)
    elif kind == "call_function":
        target = _operator(entry["target"])
        args = tuple(_decode(a, known) for a in entry["args"])
        kwargs = {str(k): _decode(v, known) for k, v in entry.get("kwargs", {}).items()}
        node = graph.call_function(target, args, kwargs)
    elif kind == "output":
        node = graph.output(tuple(_decode(a, known) for a in entry["args"]))
    else:
        raise ValueError("unknown kind of node")
    node.meta["name"] = name
    known[name] = node


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _operator(name: Any) -> Any:
    if not isinstance(name, str):
        raise ValueError("the target is no text")
    if name in PYTHON:
        module, _, attribute = name.rpartition(".")
        return getattr(_MODULES[module], attribute)
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    allowed = ATEN if namespace == "aten" else _MOPT_OPERATORS if namespace == "mopt" else ()
    if base in allowed and overload.isidentifier():
        packet = getattr(getattr(torch.ops, namespace), base, None)
        if packet is not None and overload in packet.overloads():
            return getattr(packet, overload)
    raise ArtifactError(
        f"operator {quote(name)} is not on the list of allowed operators",
        code="forbidden-operator",
    )


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"%": value.name}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int):
        # Larger integers do not survive every JSON reader.
        return value if abs(value) <= 2**53 else {"int": str(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    for kind in (torch.dtype, torch.device, torch.layout, torch.memory_format):
        if isinstance(value, kind):
            return {kind.__name__: str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
    raise ValueError(f"cannot write {quote(value)}")


def _decode(value: Any, known: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, known) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "%":
        return known[content]
    if kind == "int":
        return int(content)
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    if kind in ("dtype", "layout", "memory_format"):
        found = getattr(torch, content)
        if not isinstance(found, getattr(torch, kind)):
            raise ValueError(content)
        return found
    if kind == "slice":
        return slice(*(_decode(v, known) for v in content))
    raise ValueError(kind)
