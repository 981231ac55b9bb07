"""Runs a graph by its memory plan: one arena, every planned result at its offset.

Results that lie in the arena are tensors made once, when the graph is loaded; what only looks at
them is evaluated then, too. A run calls the operators that compute, each writing to its place.
Results beside the arena are allocated in every run, or lie where an input did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mopt.backends.eager.out_calls import WAYS
from mopt.backends.eager.plan_file import MemoryLayout, Place
from mopt.effects import is_pure
from mopt.errors import ArtifactError, quote


class PlannedGraph:
    """A graph with its arena; calling it takes flat inputs and gives flat outputs.

    Inputs of other sizes than the plan was made for run without it, by ``module`` as it is, if the
    program takes other sizes; ``module`` is given up otherwise, and with it the weights that are
    kept in another layout now. Inputs with other strides are copied first. ``arena`` is allocated
    here and kept until the object is dropped. ``consume`` removes weights from ``module`` as soon
    as they are kept in another layout.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        layout: MemoryLayout,
        names: Mapping[fx.Node, str],
        *,
        consume: bool = False,
    ) -> None:
        self._module = module if layout.dynamic else None
        self._layout = layout
        self.arena = torch.empty(layout.arena_bytes, dtype=torch.uint8)
        with torch.no_grad():
            self._run = _Builder(module, layout, names, self.arena, consume).build()

    def __call__(self, *inputs: Any) -> Any:
        """The flat outputs, in memory of their own."""
        specs = self._layout.inputs
        pairs = list(zip(inputs, specs, strict=True))
        if all(spec is None or spec.suits(value) for value, spec in pairs):
            return self._run(*inputs)
        if self._module is not None:
            return self._module(*inputs)
        return self._run(*(v if spec is None else spec.copy_of(v) for v, spec in pairs))


@dataclass(frozen=True)
class _Const:
    """A value known when the graph is loaded; a tensor's contents may still change."""

    value: Any


@dataclass(frozen=True)
class _Var:
    """A value that every run makes anew, under a name in the generated function."""

    name: str


@dataclass
class _Builder:
    """Writes the function that a run calls. Names in it are made here, never read from a file."""

    module: fx.GraphModule
    layout: MemoryLayout
    names: Mapping[fx.Node, str]
    arena: Tensor
    consume: bool
    scope: dict[str, Any] = field(default_factory=dict)
    known: dict[fx.Node, _Const | _Var] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def build(self) -> Callable[..., Any]:
        parameters = []
        graph = self.module.graph
        for node in graph.nodes:
            if node.op == "placeholder":
                parameters.append(f"v{len(self.known)}")
                self.known[node] = _Var(parameters[-1])
            elif node.op == "get_attr":
                self.known[node] = _Const(_attribute(self.module, str(node.target)))
            elif node.op == "call_function":
                self._call(node)
            else:
                result = self._text(node.args[0])
        self._drop_early(set(parameters))
        body = "".join(f"    {line}\n" for line in [*self.lines, f"return {result}"])
        source = f"def run({', '.join(parameters)}):\n{body}"
        exec(compile(source, "<planned graph>", "exec"), self.scope)
        found: Callable[..., Any] = self.scope["run"]
        return found

    def _call(self, node: fx.Node) -> None:
        name = self.names[node]
        place = self.layout.places.get(name)
        is_constant = self._is_constant((node.args, node.kwargs))
        if place is not None:
            self._place(node, place)
        elif name not in self.layout.calls and is_pure(node):
            if is_constant:
                args, kwargs = self._values(node.args), self._values(node.kwargs)
                self.known[node] = _Const(_callable(node)(*args, **kwargs))
            elif node.users:
                self._assign(node)
        elif is_constant and _returns_argument(node):
            args = self._values(node.args)
            self.lines.append(self._line(_callable(node), node.args, node.kwargs))
            self.known[node] = _Const(args[0])
        else:
            self._assign(node)

    def _assign(self, node: fx.Node) -> None:
        name = f"v{len(self.known)}"
        self.known[node] = _Var(name)
        self.lines.append(f"{name} = {self._line(_callable(node), node.args, node.kwargs)}")

    def _place(self, node: fx.Node, place: Place) -> None:
        """A call that writes to its place in the arena."""
        way = WAYS[place.call]
        run = way.prepare(node.target)  # type: ignore[arg-type]
        assert run is not None, place.call
        out = self._out(node, place)
        args: tuple[Any, ...] = node.args
        if way.pack is not None:
            assert isinstance(args[0], fx.Node)
            shape = self.layout.specs[self.names[args[0]]].shape
            like = torch.empty(shape, device="meta")
            packed = way.pack(like, *self._values(args[1:]))
            args = (args[0], *map(_Const, packed[1:]))
            self._forget(node.args[way.packed_argument])
        self.lines.append(self._line(run, (out, *args), node.kwargs))
        self.known[node] = out

    def _out(self, node: fx.Node, place: Place) -> _Const | _Var:
        """The tensor a call writes to: in the arena, over an input that nobody needs any more, or
        new in every run."""
        if place.offset is not None:
            return _Const(place.view_of(self.arena))
        if place.shares is not None:
            for source in node.all_input_nodes:
                name = self.names[source]
                if self.layout.lies_in.get(name) == place.shares and isinstance(
                    known := self.known[source], _Var
                ) and self.layout.specs[name] == place.spec:  # fmt: skip
                    return known
            raise ArtifactError(
                f"malformed memory plan: {quote(self.names[node])} is to be written over "
                f"{quote(place.shares)}, which it does not read in the same form",
                code="malformed-plan",
            )
        new = _Var(f"v{len(self.known)}")
        spec = place.spec
        empty = self._line(torch.empty_strided, (spec.shape, spec.stride), {"dtype": spec.dtype})
        self.lines.append(f"{new.name} = {empty}")
        return new

    def _forget(self, weight: Any) -> None:
        """Give up a weight that only this call reads, now that it is kept in another layout."""
        if self.consume and not self.layout.dynamic and len(weight.users) == 1:
            self.known[weight] = _Const(None)
            owner, _, leaf = str(weight.target).rpartition(".")
            delattr(self.module.get_submodule(owner), leaf)

    def _line(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        parts = [self._text(a) for a in args]
        if kwargs:
            items = ", ".join(f"{self._name(k)}: {self._text(v)}" for k, v in kwargs.items())
            parts.append(f"**{{{items}}}")
        return f"{self._name(function)}({', '.join(parts)})"

    def _text(self, argument: Any) -> str:
        """An argument as an expression of the generated function."""
        if isinstance(argument, fx.Node):
            argument = self.known[argument]
        if isinstance(argument, _Var):
            return argument.name
        if isinstance(argument, _Const):
            return self._name(argument.value)
        if isinstance(argument, list | tuple) and not self._is_constant(argument):
            items = "".join(f"{self._text(a)}, " for a in argument)
            return f"[{items}]" if isinstance(argument, list) else f"({items})"
        return self._name(self._values(argument))

    def _name(self, value: Any) -> str:
        name = f"c{len(self.scope)}"
        self.scope[name] = value
        return name

    def _is_constant(self, arguments: Any) -> bool:
        found: list[bool] = []
        fx.map_arg(arguments, lambda n: found.append(isinstance(self.known[n], _Const)))
        return all(found)

    def _values(self, arguments: Any) -> Any:
        def value(node: fx.Node) -> Any:
            known = self.known[node]
            assert isinstance(known, _Const)
            return known.value

        return fx.map_arg(arguments, value)

    def _drop_early(self, parameters: set[str]) -> None:
        """Forget values after the last line that uses them: their memory is needed again."""
        result = self.module.graph.output_node()
        kept = {v.name for n in result.all_input_nodes if isinstance(v := self.known[n], _Var)}
        names = {v.name for v in self.known.values() if isinstance(v, _Var)} - kept - parameters
        seen: set[str] = set()
        for index in range(len(self.lines) - 1, -1, -1):
            used = _identifiers(self.lines[index]) & names - seen
            seen |= used
            if used:
                self.lines[index] += "; del " + ", ".join(sorted(used))


def _identifiers(line: str) -> set[str]:
    for mark in "()[]{},:*=;":
        line = line.replace(mark, " ")
    return set(line.split())


def _callable(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def _returns_argument(node: fx.Node) -> bool:
    """Whether a call writes to its first argument and gives it back, like ``add_``."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args:
        return False
    schema = node.target._schema
    first = schema.arguments[0].alias_info
    given = [result.alias_info for result in schema.returns]
    return (
        first is not None
        and first.is_write
        and len(given) == 1
        and given[0] is not None
        and given[0].before_set == first.before_set
        and str(schema.returns[0].type) == "Tensor"
    )


def _attribute(module: fx.GraphModule, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) and not value.requires_grad else value
