"""What a lowered model takes and gives, as data: names, dtypes, sizes and nesting.

A tree is one of ``{"leaf": i}`` (the i-th tensor), ``{"tuple": [...]}``, ``{"list": [...]}``,
``{"dict": {...}}`` and ``{"value": constant}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mopt.errors import ArtifactError, InputError, quote

Tree = dict[str, Any]
_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: ``shape`` holds integers, and names for sizes that may vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @staticmethod
    def from_json(data: Any) -> TensorSpec:
        """Read and check; raises ArtifactError."""
        if not isinstance(data, dict) or set(data) != {"name", "dtype", "shape"}:
            raise _malformed(data)
        name, dtype, shape = data["name"], data["dtype"], data["shape"]
        sizes_ok = isinstance(shape, list) and all(
            isinstance(s, str) or (isinstance(s, int) and not isinstance(s, bool) and s >= 0)
            for s in shape
        )
        if not isinstance(name, str) or not isinstance(dtype, str) or not sizes_ok:
            raise _malformed(data)
        return TensorSpec(name, dtype, tuple(shape))

    def describe(self) -> str:
        """``float32[batch, 128]``."""
        return f"{self.dtype}[{', '.join(str(s) for s in self.shape)}]"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one graph, with the nesting the user's model had."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    args: tuple[Tree, ...]
    kwargs: Mapping[str, Tree]
    result: Tree

    def as_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {
            "inputs": [spec.as_json() for spec in self.inputs],
            "outputs": [spec.as_json() for spec in self.outputs],
            "args": list(self.args),
            "kwargs": dict(self.kwargs),
            "result": self.result,
        }

    @staticmethod
    def from_json(data: Any) -> Signature:
        """Read and check; raises ArtifactError."""
        keys = {"inputs", "outputs", "args", "kwargs", "result"}
        if not isinstance(data, dict) or set(data) != keys:
            raise _malformed(data)
        inputs = tuple(TensorSpec.from_json(item) for item in _list(data["inputs"]))
        outputs = tuple(TensorSpec.from_json(item) for item in _list(data["outputs"]))
        if not isinstance(data["kwargs"], dict):
            raise _malformed(data["kwargs"])
        for tree in [*_list(data["args"]), *data["kwargs"].values()]:
            _check_tree(tree, len(inputs))
        _check_tree(data["result"], len(outputs))
        return Signature(inputs, outputs, tuple(data["args"]), dict(data["kwargs"]), data["result"])

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The input tensors in order. Raises InputError saying what was expected and found."""
        if len(args) != len(self.args) or set(kwargs) != set(self.kwargs):
            raise InputError(
                f"expected {len(self.args)} positional inputs and keywords {sorted(self.kwargs)}, "
                f"found {len(args)} and {sorted(kwargs)}",
                code="input-structure",
                hint="inputs: " + ", ".join(f"{s.name} {s.describe()}" for s in self.inputs),
            )
        leaves: dict[int, Any] = {}
        for position, (value, tree) in enumerate(zip(args, self.args, strict=True)):
            _collect(value, tree, leaves, f"input {position}")
        for name, tree in self.kwargs.items():
            _collect(kwargs[name], tree, leaves, f"input {name!r}")
        flat = [leaves[index] for index in range(len(self.inputs))]
        self._check_sizes(flat)
        return flat

    def _check_sizes(self, flat: list[Any]) -> None:
        sizes: dict[str, int] = {}
        for value, spec in zip(flat, self.inputs, strict=True):
            shape = tuple(value.shape)
            dtype = str(value.dtype).removeprefix("torch.")
            fits = len(shape) == len(spec.shape) and dtype == spec.dtype
            for found, wanted in zip(shape, spec.shape, strict=False):
                if isinstance(wanted, int):
                    fits = fits and found == wanted
                elif wanted.isidentifier():
                    fits = fits and sizes.setdefault(wanted, found) == found
            if not fits:
                raise InputError(
                    f"input {spec.name!r}: expected {spec.describe()}, "
                    f"found {dtype}[{', '.join(map(str, shape))}]",
                    code="input-shape",
                    hint="names in the shape may vary, numbers are fixed at compile time",
                )

    def unflatten(self, flat: Sequence[Any]) -> Any:
        """Output tensors in the nesting of the user's model."""
        return _build(self.result, flat)


class Record(dict[str, Any]):
    """A mapping whose entries are also attributes, for models that return named outputs."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def describe_tree(value: Any, leaves: list[Any], is_leaf: Any) -> Tree:
    """The tree of a nested value; its leaves are appended to ``leaves``.

    ``is_leaf(value)`` tells tensors; containers that are neither sequences nor mappings are
    expected to have been turned into one of them.
    """
    if is_leaf(value):
        leaves.append(value)
        return {"leaf": len(leaves) - 1}
    if isinstance(value, Mapping):
        return {"dict": {str(k): describe_tree(v, leaves, is_leaf) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [describe_tree(v, leaves, is_leaf) for v in value]}
    if isinstance(value, _CONSTANTS):
        return {"value": value}
    raise InputError(
        f"a value of type {type(value).__name__} is neither a tensor nor a plain container",
        code="unsupported-value",
        hint="return tensors in tuples, lists and dicts (for transformers: use_cache=False)",
    )


def _collect(value: Any, tree: Tree, leaves: dict[int, Any], where: str) -> None:
    ((kind, content),) = tree.items()
    if kind == "leaf":
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise InputError(
                f"{where}: expected a tensor or array, found {type(value).__name__}",
                code="input-type",
            )
        leaves[content] = value
    elif kind == "value":
        if value != content:
            raise InputError(
                f"{where}: is fixed at {quote(content)}, found {quote(value)}", code="input-value"
            )
    elif kind == "dict":
        if not isinstance(value, Mapping) or set(value) != set(content):
            raise InputError(f"{where}: expected keys {sorted(content)}", code="input-structure")
        for key, sub in content.items():
            _collect(value[key], sub, leaves, f"{where}[{key!r}]")
    else:
        if not isinstance(value, list | tuple) or len(value) != len(content):
            raise InputError(f"{where}: expected {len(content)} items", code="input-structure")
        for index, sub in enumerate(content):
            _collect(value[index], sub, leaves, f"{where}[{index}]")


def _build(tree: Tree, flat: Sequence[Any]) -> Any:
    ((kind, content),) = tree.items()
    if kind == "leaf":
        return flat[content]
    if kind == "value":
        return content
    if kind == "dict":
        return Record({key: _build(sub, flat) for key, sub in content.items()})
    items = [_build(sub, flat) for sub in content]
    return items if kind == "list" else tuple(items)


def _check_tree(tree: Any, leaves: int) -> None:
    if not isinstance(tree, dict) or len(tree) != 1:
        raise _malformed(tree)
    ((kind, content),) = tree.items()
    if kind == "leaf":
        if not isinstance(content, int) or isinstance(content, bool) or not 0 <= content < leaves:
            raise _malformed(tree)
    elif kind in ("list", "tuple"):
        for item in _list(content):
            _check_tree(item, leaves)
    elif kind == "dict":
        if not isinstance(content, dict):
            raise _malformed(tree)
        for item in content.values():
            _check_tree(item, leaves)
    elif kind != "value" or not isinstance(content, _CONSTANTS):
        raise _malformed(tree)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _malformed(value)
    return value


def _malformed(value: Any) -> ArtifactError:
    return ArtifactError(f"malformed signature near {quote(value)}", code="malformed-manifest")
