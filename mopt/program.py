"""Program: a model as an ATen graph that owns its weights.

The graph is what ``torch.export`` gives before decomposition, with the weights as attributes of a
``torch.fx.GraphModule``. Passes edit the graph and its weights with plain fx calls and the few
helpers here. Weights are replaced, never written to: copies share them.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from mopt.errors import PassError, first_line
from mopt.flops import ModelSize, node_flops
from mopt.hashes import tensor_hash
from mopt.shapes import derive_shapes

if TYPE_CHECKING:
    from mopt.pipeline import Step

_TORCH_ROOT = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


@dataclass(frozen=True)
class Outside:
    """A part of the user's model that stayed eager, and why."""

    path: str
    reason: str
    source: str
    parameters: int
    flops: int


@dataclass(frozen=True)
class Coverage:
    """How much of the model is inside Programs: shares from 0 to 1."""

    parameters: float = 1.0
    flops: float = 1.0
    outside: tuple[Outside, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether nothing that computes stayed outside."""
        return not self.outside


@dataclass
class Program:
    """One captured graph with its weights, example inputs and dynamic shapes.

    ``args`` and ``kwargs`` are the example inputs; ``dynamic_shapes`` has the form that
    ``torch.export.export`` takes. ``plan`` holds what passes decided for later stages (memory,
    schedule), as JSON-like data; ``steps`` tells which passes made it. ``path`` is the module path
    of the part it was captured from, empty for a whole model; ``original`` its size before passes.
    """

    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    name: str = "model"
    path: str = ""
    coverage: Coverage = field(default_factory=Coverage)
    plan: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    original: ModelSize | None = None

    # ---- structure

    @property
    def graph(self) -> fx.Graph:
        """The fx graph; call :meth:`refresh` after editing it."""
        return self.graph_module.graph

    @property
    def nodes(self) -> list[fx.Node]:
        """A snapshot of the nodes in order, safe to edit under."""
        return list(self.graph.nodes)

    def parts(self) -> dict[str, Program]:
        """The graphs this program consists of, by module path; just itself here."""
        return {self.path: self}

    def copy(self) -> Program:
        """A program with its own graph that shares every weight with this one.

        Weights that no node reads are left behind.
        """
        graph = _copy_graph(self.graph)
        module = fx.GraphModule(
            self.graph_module, graph, class_name=type(self.graph_module).__name__
        )
        module.train(self.graph_module.training)
        return Program(
            module, self.args, self.kwargs, self.dynamic_shapes, self.name, self.path,
            self.coverage, copy.deepcopy(self.plan), list(self.steps), self.original_size(),
        )  # fmt: skip

    def refresh(self) -> None:
        """Make the module run the edited graph, and fill in the shapes of new nodes."""
        self.graph.lint()
        self.graph_module.recompile()
        derive_shapes(self.graph_module)

    def verify(self) -> None:
        """Check the graph: well formed, every weight present, every shape derivable.

        Raises PassError naming the first node that is wrong.
        """
        for node in self.graph.nodes:
            if node.op == "get_attr" and _lookup(self.graph_module, node.target) is None:
                raise PassError(
                    f"node {node.name!r} reads weight {node.target!r}, which does not exist",
                    code="missing-weight",
                    site=site_of(node),
                )
        spec = self.graph_module._out_spec
        returned = len(pytree.tree_leaves(self.graph.output_node().args))
        if returned != spec.num_leaves:
            raise PassError(
                f"the program has {returned} outputs, it had {spec.num_leaves}", code="output-count"
            )
        try:
            self.graph.lint()
        except RuntimeError as error:
            raise PassError(f"the graph is malformed: {error}", code="malformed-graph") from error
        try:
            derive_shapes(self.graph_module)
        except Exception as error:  # whatever an operator's shape rule raises
            node = _failing_node(error, self.graph)
            raise PassError(
                f"node {node.name if node else '?'!r} cannot work on its inputs: "
                f"{first_line(error)}",
                code="bad-shapes",
                site=site_of(node) if node else None,
            ) from error

    # ---- weights

    def weight(self, node: fx.Node) -> Tensor:
        """The tensor a ``get_attr`` node reads."""
        assert node.op == "get_attr"
        value = _lookup(self.graph_module, node.target)
        assert isinstance(value, Tensor), node.target
        return value.detach()

    def requires_grad(self, node: fx.Node) -> bool:
        """Whether a ``get_attr`` node reads a trainable parameter."""
        return bool(getattr(_lookup(self.graph_module, str(node.target)), "requires_grad", False))

    def constant(self, argument: Any) -> Tensor | None:
        """The tensor behind a node argument if it is a weight, else None."""
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            return self.weight(argument)
        return None

    def add_weight(self, path: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """Store ``tensor`` under a new name near ``path`` and return a node that reads it."""
        name, count = path, 1
        while _lookup(self.graph_module, name) is not None:
            count += 1
            name = f"{path}_{count}"
        *parents, leaf = name.split(".")
        owner: torch.nn.Module = self.graph_module
        for parent in parents:
            if parent not in dict(owner.named_children()):
                owner.add_module(parent, torch.nn.Module())
            owner = owner.get_submodule(parent)
        owner.register_buffer(leaf, tensor.detach(), persistent=True)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        mode = next((n.meta["val"].fake_mode for n in self.graph.nodes
                     if hasattr(n.meta.get("val"), "fake_mode")), None)  # fmt: skip
        node.meta["val"] = mode.from_tensor(tensor.detach()) if mode else tensor
        return node

    def weights(self) -> dict[str, Tensor]:
        """Every tensor that a node reads, by attribute path, in graph order."""
        return {
            node.target: self.weight(node)
            for node in self.graph.nodes
            if node.op == "get_attr" and node.users
        }

    def insert_call(self, target: Any, args: tuple[Any, ...], *, like: fx.Node) -> fx.Node:
        """A new call before ``like`` that inherits its module path and source line."""
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, args)
        node.meta.update({k: like.meta[k] for k in ("nn_module_stack", "stack_trace")
                          if k in like.meta})  # fmt: skip
        return node

    def replace_call(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        """Put a call of ``target`` in place of ``node``, which is erased."""
        new = self.insert_call(target, args, like=node)
        new.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        return new

    # ---- numbers

    def size_bytes(self) -> int:
        """Bytes of the weights that are read, shared ones once."""
        storages = {
            (t.untyped_storage().data_ptr(), t.storage_offset(), t.dtype): t.numel()
            * t.element_size()
            for t in self.weights().values()
            if t.numel()
        }
        return sum(storages.values())

    def original_size(self) -> ModelSize:
        """Bytes of the weights and FLOPs of a run before the first pass."""
        return self.original or ModelSize(self.size_bytes(), self.flops())

    def parameter_count(self) -> int:
        """Elements of the weights that are read, shared ones once."""
        places = {(t.untyped_storage().data_ptr(), t.storage_offset()): t.numel()
                  for t in self.weights().values()}  # fmt: skip
        return sum(places.values())

    def flops(self) -> int:
        """FLOPs of one run on the example inputs."""
        return sum(node_flops(node) for node in self.graph.nodes)

    # ---- text

    def text(self) -> str:
        """The graph in a stable, readable form: no addresses, no weight values, no file names."""
        return "\n".join(_line(node) for node in self.graph.nodes) + "\n"

    def fingerprint(self) -> str:
        """A hash of the graph text and of every weight's content (hex SHA-256)."""
        digest = hashlib.sha256(self.text().encode())
        for path, tensor in self.weights().items():
            digest.update(f"{path}:{tensor_hash(tensor)}\n".encode())
        return digest.hexdigest()

    # ---- running

    def flat_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Inputs in placeholder order, as the graph takes them."""
        spec = self.graph_module._in_spec
        names = list(spec.child(1).context or [])
        missing = [name for name in names if name not in kwargs]
        if missing or len(kwargs) != len(names):
            raise TypeError(f"expected keyword inputs {names}, found {sorted(kwargs)}")
        flat, found = pytree.tree_flatten((args, {name: kwargs[name] for name in names}))
        if found.num_leaves != spec.num_leaves:
            raise TypeError(f"expected {spec.num_leaves} input tensors, found {found.num_leaves}")
        return flat

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, in its own nesting. No gradients are recorded."""
        with torch.no_grad():
            return self.graph_module(*args, **kwargs)

    def run_flat(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The model's output tensors as a flat list."""
        return pytree.tree_leaves(self.run(*args, **kwargs))

    def interpret(
        self,
        visit: Callable[[fx.Node, Any], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Run node by node; ``visit(node, value)`` sees every value and may return another.

        Values are dropped as soon as their last user has run.
        """
        flat = self.flat_inputs(args, kwargs or {})
        with torch.no_grad():
            out = _Visitor(self.graph_module, visit).run(*flat, enable_io_processing=False)
        return pytree.tree_leaves(out)


class _Visitor(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, visit: Callable[[fx.Node, Any], Any]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._visit = visit

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        replaced = self._visit(n, value)
        return value if replaced is None else replaced


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    copied = new.graph_copy(graph, val_map={}, return_output_node=True)
    assert isinstance(copied, tuple)
    result, old_output = copied
    output = new.output(result)
    output.meta = dict(old_output.meta)
    new.set_codegen(graph._codegen)
    return new


def _line(node: fx.Node) -> str:
    path = module_path(node)
    where = f"  # {path}" if path else ""
    kwargs = {k: v for k, v in node.kwargs.items()}
    arguments = [_format(a) for a in node.args] + [f"{k}={_format(v)}" for k, v in kwargs.items()]
    target = str(node.target) if node.op in ("get_attr", "placeholder") else _target_name(node)
    if node.op == "output":
        return f"return {', '.join(arguments)}"
    body = f"{node.op} {target}" if node.op != "call_function" else f"{target}"
    if node.op == "call_function":
        body += f"({', '.join(arguments)})"
    return f"%{node.name}: {_type(node.meta.get('val'))} = {body}{where}"


def _target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return getattr(target, "__name__", str(target))


def _format(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_format(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_format(v)}" for k, v in value.items()) + "}"
    return repr(value) if isinstance(value, str) else str(value)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        sizes = ", ".join(str(s) for s in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_type(v) for v in value) + ")"
    return type(value).__name__ if value is not None else "?"


def _lookup(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
        if value is None:
            return None
    return value


def _failing_node(error: BaseException, graph: fx.Graph) -> fx.Node | None:
    found = re.search(r"While executing %(\w+)", str(error))
    names = {node.name: node for node in graph.nodes}
    return names.get(found.group(1)) if found else None


def module_path(node: fx.Node) -> str:
    """The path of the user's module that a node belongs to, empty for the top."""
    stack = node.meta.get("nn_module_stack") or {}
    # Export marks nodes it adds itself, such as sizes, with a module that does not exist.
    paths = [path for path, _ in stack.values() if not path.startswith("_empty_nn_module_stack")]
    return str(paths[-1]) if paths else ""


def source_line(node: fx.Node) -> str:
    """``file:line`` of the user's code a node came from: the innermost frame outside torch."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in frames if not file.startswith(_TORCH_ROOT)]
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""


def site_of(node: fx.Node) -> str:
    """Where a node is, for messages: module path and source line, as far as known."""
    known = [part for part in (module_path(node), source_line(node)) if part]
    return ", ".join(known) or f"node {node.name}"


def is_dynamic(node: fx.Node) -> bool:
    """Whether the shape of a node's value depends on the inputs' sizes."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and bool(free_symbols(value))


def iter_calls(program: Program, *targets: Any) -> Iterator[fx.Node]:
    """The calls of any of ``targets``, in graph order, safe to edit under."""
    for node in program.nodes:
        if node.op == "call_function" and node.target in targets:
            yield node
