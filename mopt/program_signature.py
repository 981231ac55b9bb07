"""The signature of a program: what its graph takes and gives, in the names its user gave."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mopt.errors import LoweringError
from mopt.program import Program
from mopt.signature import Signature, TensorSpec, describe_tree


def signature_of(program: Program) -> Signature:
    """Names, dtypes, sizes and nesting of one graph's inputs and outputs."""

    def is_leaf(value: Any) -> bool:
        return isinstance(value, Tensor)

    leaves: list[Any] = []
    args = tuple(describe_tree(plain_containers(a), leaves, is_leaf) for a in program.args)
    kwargs = {
        k: describe_tree(plain_containers(v), leaves, is_leaf) for k, v in program.kwargs.items()
    }
    placeholders = _tensor_inputs(program)
    if len(placeholders) != len(leaves):
        raise LoweringError(
            f"the graph takes {len(placeholders)} tensors, the example inputs hold {len(leaves)}",
            code="input-structure",
        )
    names = size_names(program)
    inputs = tuple(
        TensorSpec(str(node.target), _dtype(node.meta["val"]), _sizes(node.meta["val"], names))
        for node in placeholders
    )
    output = next(node for node in program.graph.nodes if node.op == "output")
    values = [
        argument.meta["val"] if hasattr(argument, "meta") else argument
        for argument in output.args[0]
    ]
    found: list[Any] = []
    result = describe_tree(plain_containers(_example_outputs(program, values)), found, is_leaf)
    tensors = [value for value in values if isinstance(value, Tensor)]
    outputs = tuple(
        TensorSpec(f"output_{i}", _dtype(value), _sizes(value, names))
        for i, value in enumerate(tensors)
    )
    return Signature(inputs, outputs, args, kwargs, result)


def _example_outputs(program: Program, values: list[Any]) -> Any:
    """Outputs in the model's own nesting, without values where every one is a tensor."""
    spec = program.graph_module._out_spec
    if len(values) == spec.num_leaves and all(isinstance(value, Tensor) for value in values):
        return pytree.tree_unflatten(values, spec)
    return program.run(*program.args, **program.kwargs)


def plain_containers(value: Any) -> Any:
    """A value with registered containers (model outputs, caches) as mappings and tuples."""
    if isinstance(value, torch.Tensor | str) or value is None:
        return value
    if isinstance(value, Mapping):
        return {k: plain_containers(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [plain_containers(v) for v in value]
    if isinstance(value, tuple):
        return tuple(plain_containers(v) for v in value)
    if type(value) in pytree.SUPPORTED_NODES:
        return tuple(plain_containers(v) for v in pytree.tree_leaves(value))
    return value


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _sizes(value: Tensor, names: Mapping[str, str]) -> tuple[int | str, ...]:
    def named(size: object) -> str:
        return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), str(size))

    return tuple(size if isinstance(size, int) else named(size) for size in value.shape)


def size_names(program: Program) -> dict[str, str]:
    """The user's names of the sizes that vary: torch's symbol to the name of its ``Dim``.

    Sizes that the user declared without a name (``Dim.AUTO``, ``Dim.DYNAMIC``) keep torch's.
    """
    inputs = _tensor_inputs(program)
    given = program.dynamic_shapes
    if isinstance(given, Mapping):
        leaves = [
            *(leaf for node, value in zip(inputs, program.args, strict=False)
              for leaf in _with_dims(value, given.get(str(node.target)))),
            *(leaf for key, value in program.kwargs.items()
              for leaf in _with_dims(value, given.get(key))),
        ]  # fmt: skip
    else:
        specs = given if isinstance(given, list | tuple) else ()
        leaves = [*_with_dims(program.args, specs), *_with_dims(program.kwargs, None)]
    names: dict[str, str] = {}
    for node, dims in zip(inputs, leaves, strict=False):
        for axis, dim in dims.items():
            size, name = node.meta["val"].shape[axis], getattr(dim, "__name__", "")
            if isinstance(size, torch.SymInt) and str(size).isidentifier() and name.isidentifier():
                names.setdefault(str(size), name)
    return names if len(set(names.values())) == len(names) else {}


def _with_dims(value: Any, spec: Any) -> Iterator[dict[int, Any]]:
    """For each tensor in ``value``, in order, what ``spec`` says of its axes."""
    if isinstance(value, Tensor):
        axes = spec if isinstance(spec, Mapping) else dict(enumerate(spec or ()))
        yield {axis % value.dim(): dim for axis, dim in axes.items()} if value.dim() else {}
    elif isinstance(value, Mapping):
        inner = spec if isinstance(spec, Mapping) else {}
        for key, item in value.items():
            yield from _with_dims(item, inner.get(key))
    elif isinstance(value, list | tuple):
        parts = list(spec) if isinstance(spec, list | tuple) else []
        parts += [None] * (len(value) - len(parts))
        for item, part in zip(value, parts, strict=False):
            yield from _with_dims(item, part)
    else:
        yield from ({} for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _tensor_inputs(program: Program) -> list[fx.Node]:
    return [
        node
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
    ]
