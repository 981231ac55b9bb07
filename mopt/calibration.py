"""The calibration data a user gives: checked batch by batch, streamed, never piled up.

Statistics of inner values are collected by running a Program node by node with one batch at a time
(:meth:`Calibration.collect`); what a statistic is, is in ``mopt/observers.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mopt.errors import InputError, quote
from mopt.frontend import normalize_inputs
from mopt.islands import IslandProgram
from mopt.machine import trim_heap
from mopt.observers import Observer
from mopt.pass_base import PassContext
from mopt.program import Program, site_of

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Calibration:
    """Inputs like those the model will meet, for a program.

    ``batches`` is any iterable of what the model takes: a tuple of positional inputs, a mapping of
    keyword inputs or one tensor (numpy arrays count as tensors). A one-shot iterator is kept in
    memory once read; anything else is iterated anew each time. ``limit`` stops after that many
    batches. Every batch is checked when it is read: InputError names the batch and the input.
    """

    def __init__(
        self, batches: Iterable[Any], program: Program, *, limit: int | None = None
    ) -> None:
        if isinstance(batches, Tensor | np.ndarray | Mapping | str):
            raise InputError(
                f"calibration must be an iterable of batches, found {type(batches).__name__}",
                code="bad-calibration",
                hint="pass a list of batches: [inputs, ...]",
            )
        self.program = program
        self.limit = limit
        self._given = batches
        self._kept: list[Any] | None = [] if iter(batches) is batches else None
        self._exhausted = False

    @property
    def expected_batches(self) -> int:
        """How many batches there are, 0 if that is not known before reading them."""
        known = length_hint(self._given, 0) or len(self._kept or ())
        return known if self.limit is None else min(known, self.limit)

    def __iter__(self) -> Iterator[Call]:
        """The batches as (args, kwargs) in the form the program takes."""
        count = 0
        for raw in self._raw():
            if self.limit is not None and count >= self.limit:
                return
            yield _checked(raw, self.program, count)
            count += 1
        if count == 0:
            raise InputError(
                "calibration data holds no batches",
                code="empty-calibration",
                hint="an iterator that was used up gives nothing a second time: pass a list",
            )

    def _raw(self) -> Iterator[Any]:
        if self._kept is None:
            yield from self._given
            return
        yield from self._kept
        if self._exhausted:
            return
        for raw in self._given:
            self._kept.append(raw)
            yield raw
        self._exhausted = True

    def for_part(self, part: Program) -> Calibration | PartCalibration:
        """The data as one captured part of the program takes it.

        For a whole program that is the data itself. For a part of a model with islands, the user's
        model runs eagerly, batch by batch, and the inputs of that submodule are recorded.
        """
        if isinstance(self.program, IslandProgram):
            return PartCalibration(self, part)
        same = Calibration([], part, limit=self.limit)
        same._given, same._kept, same._exhausted = self._given, self._kept, self._exhausted
        return same

    def collect(
        self,
        observers: Mapping[fx.Node, Observer],
        ctx: PassContext,
        replaced: Mapping[tuple[fx.Node, fx.Node], Tensor] | None = None,
    ) -> int:
        """Show every batch's values to the observers of nodes of ``self.program``.

        ``replaced`` gives (call, node) another value where the call reads the node, such as a
        weight that is already rounded; it is asked anew each time. Returns the number of batches.
        Raises InputError naming the node for NaN or infinity.
        """
        return collect(self, observers, ctx, replaced or {})


class PartCalibration:
    """The inputs that one captured part of a model with islands receives."""

    def __init__(self, whole: Calibration, part: Program) -> None:
        self.whole = whole
        self.program = part

    @property
    def expected_batches(self) -> int:
        """How many batches the whole model has; a part may be called several times in each."""
        return self.whole.expected_batches

    def __iter__(self) -> Iterator[Call]:
        """The calls of the part, in the order they happen."""
        program = self.whole.program
        assert isinstance(program, IslandProgram)
        expected = _shapes((self.program.args, self.program.kwargs))
        seen = other = 0
        for args, kwargs in self.whole:
            for call in program.calls_of(self.program.path, args, kwargs):
                if _shapes(call) == expected:
                    seen += 1
                    yield call
                else:
                    other += 1
        if seen == 0:
            found = f"{other} calls with other shapes" if other else "no call"
            raise InputError(
                f"calibration data led to {found} of the captured part {self.program.path!r}",
                code="uncovered-part",
                hint="give batches of the shapes the model was captured with",
            )

    def collect(
        self,
        observers: Mapping[fx.Node, Observer],
        ctx: PassContext,
        replaced: Mapping[tuple[fx.Node, fx.Node], Tensor] | None = None,
    ) -> int:
        """As :meth:`Calibration.collect`."""
        return collect(self, observers, ctx, replaced or {})


def collect(
    calls: Calibration | PartCalibration,
    observers: Mapping[fx.Node, Observer],
    ctx: PassContext,
    replaced: Mapping[tuple[fx.Node, fx.Node], Tensor],
) -> int:
    """Run the program on every call and give each observed node's values to its observer.

    What comes behind the last of these nodes does not run.
    """
    total, count = calls.expected_batches, 0
    for args, kwargs in calls:
        ctx.check_time("calibrating")
        ctx.progress.step(count, max(total, count + 1), "calibration batches")
        _Observed(calls.program, observers, replaced).run_until_seen(args, kwargs)
        trim_heap()
        count += 1
    return count


class _Observed(fx.Interpreter):
    """One run of a program up to the last observed node."""

    def __init__(
        self,
        program: Program,
        observers: Mapping[fx.Node, Observer],
        replaced: Mapping[tuple[fx.Node, fx.Node], Tensor],
    ) -> None:
        super().__init__(program.graph_module)
        self._program, self._observers, self._replaced = program, observers, replaced

    @torch.no_grad()
    def run_until_seen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises InputError naming the node for a value with NaN or infinity."""
        self.args_iter = iter(self._program.flat_inputs(args, kwargs))
        nodes, left = self._program.nodes, len(self._observers)
        dies = _last_readers(nodes)
        for node in nodes:
            value = self.env[node] = self.run_node(node)
            observer = self._observers.get(node)
            if observer is not None:
                left -= 1
                if not observer.add(value):
                    raise InputError(
                        f"the value of node {node.name!r} holds NaN or infinity on calibration "
                        "data",
                        code="non-finite-activation",
                        site=site_of(node),
                        hint="run the model on this data and look for the layer that overflows",
                    )
            if not left:
                return
            del value
            for dead in dies[node]:
                self.env.pop(dead, None)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        def value(node: fx.Node) -> Any:
            return self._replaced[n, node] if (n, node) in self._replaced else self.env[node]

        return fx.map_arg(args, value)


def _last_readers(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The nodes whose values nothing reads behind each node."""
    place = {node: at for at, node in enumerate(nodes)}
    dies: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for node in nodes:
        dies[max([node, *node.users], key=place.__getitem__)].append(node)
    return dies


def _checked(raw: Any, program: Program, index: int) -> Call:
    where = f"calibration batch {index}"
    if isinstance(raw, np.ndarray):
        raw = torch.from_numpy(raw)
    args, kwargs = normalize_inputs(raw)
    args, kwargs = pytree.tree_map_only(np.ndarray, torch.from_numpy, (args, kwargs))
    args, kwargs = _arrange(args, kwargs, program, where)
    found, spec = pytree.tree_flatten((args, kwargs))
    example, wanted = pytree.tree_flatten((program.args, program.kwargs))
    if spec.num_leaves != wanted.num_leaves or str(spec) != str(wanted):
        raise InputError(
            f"{where} has the structure {quote(str(pytree.tree_map(_kind, (args, kwargs))))}, "
            f"the model takes {quote(str(pytree.tree_map(_kind, (program.args, program.kwargs))))}",
            code="calibration-structure",
            hint="yield only the model's inputs, without labels, as in example_inputs",
        )
    names = _leaf_names(program, len(example))
    sizes: dict[str, tuple[int, str]] = {}
    for name, dims, expected, value in zip(
        names, _dimensions(program, example), example, found, strict=True
    ):
        _check_leaf(f"{where}, input {name!r}", dims, expected, value, sizes, name)
    return args, kwargs


def _arrange(args: tuple[Any, ...], kwargs: dict[str, Any], program: Program, where: str) -> Call:
    """Positional inputs for a program captured by position, keywords for one captured by name."""
    if kwargs and program.args and not program.kwargs:
        names = _leaf_names(program, len(program.args))
        unknown, missing = sorted(set(kwargs) - set(names)), sorted(set(names) - set(kwargs))
        if unknown or missing:
            raise InputError(
                f"{where} has the inputs {sorted(kwargs)}, the model takes {names}",
                code="calibration-structure",
                hint=f"leave out {unknown}" if unknown else f"add {missing}",
            )
        return tuple(kwargs[name] for name in names), {}
    if kwargs and program.kwargs:
        unknown, missing = (
            sorted(set(kwargs) - set(program.kwargs)),
            sorted(set(program.kwargs) - set(kwargs)),
        )
        if unknown or missing:
            raise InputError(
                f"{where} has the inputs {sorted(kwargs)}, "
                f"the model takes {sorted(program.kwargs)}",
                code="calibration-structure",
                hint=f"leave out {unknown}" if unknown else f"add {missing}",
            )
        return args, {name: kwargs[name] for name in program.kwargs}
    by_name = program.kwargs and not program.args
    if by_name and not kwargs and len(args) == len(program.kwargs):
        return (), dict(zip(program.kwargs, args, strict=True))
    return args, kwargs


def _check_leaf(
    where: str,
    dims: tuple[Any, ...] | None,
    expected: Any,
    value: Any,
    sizes: dict[str, tuple[int, str]],
    name: str,
) -> None:
    if not isinstance(expected, Tensor):
        if value != expected:
            raise InputError(
                f"{where}: expected {quote(expected)}, which the model was captured with, "
                f"found {quote(value)}",
                code="calibration-constant",
            )
        return
    wanted = _describe(expected.dtype, dims)
    if not isinstance(value, Tensor):
        raise InputError(
            f"{where}: expected {wanted}, found {quote(type(value).__name__)}",
            code="calibration-structure",
        )
    found = _describe(value.dtype, tuple(value.shape))
    if value.dtype != expected.dtype:
        raise InputError(
            f"{where}: expected {wanted}, found {found}",
            code="calibration-dtype",
            hint=f"convert the data with .to({expected.dtype})",
        )
    assert dims is not None
    fits = value.dim() == len(dims) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(dims, value.shape, strict=True)
    )
    if not fits:
        ragged = value.dim() == len(dims) and isinstance(dims[0] if dims else None, int)
        raise InputError(
            f"{where}: expected {wanted}, found {found}",
            code="calibration-shape",
            hint="drop a last batch that is short, or give the model dynamic_shapes"
            if ragged and value.shape[1:] == expected.shape[1:]
            else "give batches of the shapes the model was captured with",
        )
    for dim, size in zip(dims, value.shape, strict=True):
        if isinstance(dim, int):
            continue
        known = sizes.setdefault(str(dim), (size, name))
        if known[0] != size:
            raise InputError(
                f"{where}: {dim} is {size}, but {known[0]} in input {known[1]!r}",
                code="calibration-shape",
                hint="inputs of one batch must agree in their dynamic sizes",
            )
    if value.numel() == 0:
        raise InputError(f"{where}: {found} holds no values", code="empty-calibration")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InputError(f"{where} holds NaN or infinity", code="non-finite-calibration")


def _leaf_names(program: Program, count: int) -> list[str]:
    """Names of the flat inputs: those of the graph, whose order they have."""
    names = [str(n.target) for n in program.graph.nodes if n.op == "placeholder"]
    if isinstance(program, IslandProgram) or len(names) != count:
        by_name = [str(key) for key in program.kwargs]
        return [str(i) for i in range(count - len(by_name))] + by_name
    return names


def _dimensions(program: Program, example: list[Any]) -> list[tuple[Any, ...] | None]:
    """Per flat input its sizes: a number where static, a name where dynamic."""
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"]
    if isinstance(program, IslandProgram) or len(values) != len(example):
        values = example
    return [
        tuple(s if isinstance(s, int) else str(s) for s in v.shape)
        if isinstance(v, Tensor)
        else None
        for v in values
    ]


def _describe(dtype: torch.dtype, dims: tuple[Any, ...] | None) -> str:
    sizes = ", ".join(str(dim) for dim in dims or ())
    return f"{str(dtype).removeprefix('torch.')}[{sizes}]"


def _kind(value: Any) -> str:
    return _describe(value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else repr(value)


def _shapes(call: Call) -> tuple[Any, ...]:
    leaves, spec = pytree.tree_flatten(call)
    return str(spec), *((v.dtype, tuple(v.shape)) if isinstance(v, Tensor) else v for v in leaves)
