"""What a weight format is, and finding formats by name.

A format says what a weight may become, which ``mopt::`` operator computes with it and what that
takes in bytes. It does not choose the values: an algorithm (a pass) may give it a grid of scales
and zero points, or weights that already lie on one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx

import mopt.ops  # noqa: F401 - registers the operators that formats place
from mopt.errors import InputError, LoweringError, unknown_name
from mopt.formats.grid import Grid, round_, values_at_a_time
from mopt.layers import Layer
from mopt.pass_base import Skip
from mopt.program import Program, module_path, site_of

# Work on a weight goes some rows at a time, about this many values, so that what it needs beside
# the weight does not grow with it. Small enough that the allocator keeps little of it for later.
_PIECE = 1 << 18


def row_pieces(weight: Tensor, most: int | None = None) -> Iterator[slice]:
    """Slices of a weight's first axis, for work whose rows do not depend on each other.

    Each has at most ``most`` values, if a row has no more.
    """
    step = max(1, (_PIECE if most is None else most) // max(1, weight[:1].numel()))
    for start in range(0, max(1, len(weight)), step):
        yield slice(start, min(start + step, len(weight)))


@dataclass(frozen=True)
class Encoded:
    """A weight in a format: the tensors its operator reads, by argument name.

    ``shape`` is the shape of the weight before encoding. Optional tensors are absent, not None.
    """

    format: str
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @staticmethod
    def join(pieces: Iterable[Encoded], rows: int) -> Encoded:
        """The encoding of a weight of that many rows from those of its rows, in their order.

        All tensors are by rows. Pieces are copied as they come, so that no two are held.
        """
        whole: dict[str, Tensor] = {}
        start, found = 0, None
        for piece in pieces:
            if piece.shape[0] == rows:
                return piece
            stop = start + piece.shape[0]
            for name, part in piece.tensors.items():
                if name not in whole:
                    whole[name] = part.new_empty(rows, *part.shape[1:])
                whole[name][start:stop] = part
            start, found = stop, piece
        assert found is not None and start == rows
        return Encoded(found.format, (rows, *found.shape[1:]), whole)

    @property
    def is_by_rows(self) -> bool:
        """Whether every tensor has the rows of the weight along its first axis."""
        return all(t.dim() > 0 and len(t) == self.shape[0] for t in self.tensors.values())

    def rows(self, at: slice) -> Encoded:
        """The encoding of some rows, where all tensors are by rows."""
        tensors = {name: tensor[at] for name, tensor in self.tensors.items()}
        rows = len(range(*at.indices(self.shape[0])))
        return Encoded(self.format, (rows, *self.shape[1:]), tensors)


@dataclass(frozen=True)
class Format(ABC):
    """A frozen, hashable description of how weights are stored and computed with.

    ``bits`` is the width of one code, without scales; ``kinds`` the layer kinds it serves;
    ``operator`` the ``mopt::`` operator it lowers to; ``kernels`` the (backend, device kind) pairs
    that have a kernel for it faster than computing the decoded weight anew.
    """

    kinds: ClassVar[frozenset[str]] = frozenset()
    operator: ClassVar[str] = ""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name ``find_format`` gives this format back for."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one code."""

    @property
    def kernels(self) -> frozenset[tuple[str, str]]:
        """(backend, device kind) pairs with a kernel; the eager backend runs every format."""
        return frozenset()

    @classmethod
    @abstractmethod
    def parse(cls, name: str) -> Format | None:
        """The format of this family with that name, or None."""

    @classmethod
    @abstractmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the family that are worth trying, for listings and choosers."""

    def check(self, layer: Layer, weight: Tensor) -> str | None:
        """Why a layer cannot have this format, in words its owner can act on, or None."""
        if layer.kind not in self.kinds:
            return f"{self.name} is for {' and '.join(sorted(self.kinds))}, this is {layer.kind}"
        if not weight.is_floating_point():
            return f"the weight is {_dtype_name(weight.dtype)}, not floating point"
        return None

    @abstractmethod
    def encode(self, weight: Tensor, *, grid: Grid | None = None) -> Encoded:
        """The weight in this format. Raises InputError if it holds NaN or infinity."""

    @abstractmethod
    def decode(self, encoded: Encoded) -> Tensor:
        """The weight an encoding stands for, in the shape before encoding."""

    @abstractmethod
    def size_bytes(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
        """Exactly the bytes that encoding a weight of this shape and dtype takes."""

    @abstractmethod
    def place(self, program: Program, layer: Layer, encoded: Encoded) -> None:
        """Replace the layer's calls by this format's operator reading the encoded tensors."""


@dataclass(frozen=True)
class GridFormat(Format):
    """A format whose values are (code - zero point) * scale, in groups along the last axis.

    Algorithms that round column by column use :meth:`grid` and :meth:`quantize_columns`, then
    :meth:`encode` with the grid: values that lie on the grid keep their codes.
    """

    @abstractmethod
    def grid(
        self, weight: Tensor, *, ranges: str = "mse", importance: Tensor | None = None
    ) -> Grid:
        """Scales and zero points for ``weight`` (rows, columns), or for a slice of its columns.

        ``ranges`` is "min-max" or "mse"; ``importance`` (columns) weighs the squared errors that
        "mse" minimizes, or (columns, columns) pairs of errors within a group.
        """

    @abstractmethod
    def group_of(self, columns: int) -> int:
        """How many neighbouring columns of a weight with that many share a scale."""

    def quantize_columns(self, columns: Tensor, grid: Grid, group: int, start: int) -> Tensor:
        """``columns`` (rows, n) on the grid; the first is column ``start`` of the whole weight.

        ``group`` is :meth:`group_of` the whole weight's columns. The result is float32.
        """
        at = groups_of(start, columns.shape[1], group)
        scales = grid.scales.float()[:, at]
        zeros = grid.zero_points[:, at] if grid.zero_points is not None else None
        codes = round_codes(columns.float(), scales, zeros, self.bits)
        return (codes - (2 ** (self.bits - 1) if zeros is None else zeros)) * scales


def groups_of(start: int, count: int, group: int) -> slice | Tensor:
    """Which groups ``count`` columns from ``start`` on belong to, as an index."""
    if count == 1:  # the case of algorithms that round column by column
        return slice(start // group, start // group + 1)
    return torch.arange(start, start + count) // group


def round_codes(values: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Unsigned codes as floats: ``clamp(rne(x / scale) + zero, 0, 2**bits - 1)``, ONNX's order."""
    zero = 2 ** (bits - 1) if zeros is None else zeros
    return torch.clamp(round_(values / scales) + zero, 0, 2**bits - 1)


def require_finite(weight: Tensor, path: str = "", source: str | None = None) -> None:
    """Raise InputError naming the layer when a weight holds NaN or infinity."""
    pieces = row_pieces(weight, values_at_a_time())
    bad = sum(int((~torch.isfinite(weight[at])).sum()) for at in pieces)
    if not bad:
        return
    where = f" of {path!r}" if path else ""
    raise InputError(
        f"the weight{where} holds {bad} values that are NaN or infinite",
        code="non-finite-weight",
        site=source or None,
        hint="load a sound checkpoint; one such value would poison the scale of its whole group",
    )


def store(program: Program, layer: Layer, encoded: Encoded) -> dict[str, fx.Node]:
    """Nodes that read the encoded tensors, before the layer's first call.

    A tensor equal to one that the program already holds is not stored again: a table and a head
    that share their weight share their codes.
    """
    base = str(layer.weight.target)
    return {
        name: shared_weight(program, f"{base}_{name}", tensor, layer.calls[0])
        for name, tensor in encoded.tensors.items()
    }


def shared_weight(program: Program, path: str, tensor: Tensor, before: fx.Node) -> fx.Node:
    """A node that reads ``tensor``, stored under a new name unless the program has its equal."""
    for node in program.graph.nodes:
        if node.op == "get_attr" and _equal(program.weight(node), tensor):
            with program.graph.inserting_before(before):
                again = program.graph.get_attr(node.target)
            again.meta["val"] = node.meta.get("val")
            return again
    return program.add_weight(path, tensor, before)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    return torch.equal(one.reshape(-1)[:64], other.reshape(-1)[:64]) and torch.equal(one, other)


def swap_calls(
    program: Program,
    layer: Layer,
    target: Any,
    arguments: Callable[[fx.Node], tuple[Any, ...]],
) -> None:
    """Replace each call of a layer by ``target(*arguments(call))`` and drop the weight's readers.

    Readers of the weight that other layers use stay.
    """
    readers = {argument for call in layer.calls for argument in call.all_input_nodes
               if argument.op == "get_attr" and argument.target == layer.weight.target}  # fmt: skip
    for call in layer.calls:
        program.replace_call(call, target, arguments(call))
    for reader in readers:
        drop_reader(program, reader)


def drop_reader(program: Program, reader: fx.Node) -> None:
    """Erase a node that reads a weight if nothing uses it; the weight too if no other reads it."""
    if reader.users:
        return
    program.graph.erase_node(reader)
    path = str(reader.target)
    if not any(node.op == "get_attr" and node.target == path for node in program.graph.nodes):
        owner, _, leaf = path.rpartition(".")
        delattr(program.graph_module.get_submodule(owner), leaf)


def record(program: Program, layer: Layer, name: str) -> None:
    """Note in the program's plan which format a layer got: ``plan["formats"][path]``."""
    program.plan.setdefault("formats", {})[layer.path] = name


def widened_layers(program: Program) -> set[str]:
    """Paths of layers whose weights are small in the file and floats while the model runs."""
    ops = torch.ops.mopt
    always = (ops.widen.default, ops.widen_int8.default, ops.decode_levels.default)
    found = set()
    for node in program.graph.nodes:
        in_float = node.target is ops.linear_nbits.default and node.args[7] == "float"
        if in_float or node.target in always:
            path = module_path(node)
            found.add(f"{program.path}.{path}" if program.path else path)
    return found


def broken_scales(program: Program) -> list[Skip]:
    """Calls of ``mopt::`` operators that read scales or zero points with NaN or infinity."""
    found = []
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.name.startswith("mopt::"):
            continue
        for given, value in zip(schema.arguments, node.args, strict=False):
            nodes = value if isinstance(value, list | tuple) else (value,)
            held = [program.constant(one) for one in nodes]
            if "scale" in given.name or "zero_point" in given.name:
                bad = any(t is not None and not bool(t.float().isfinite().all()) for t in held)
                if bad:
                    reason = f"its {given.name} hold NaN or infinity"
                    found.append(Skip(site_of(node), reason))
    return found


def require_finite_scales(program: Program) -> None:
    """Raise LoweringError ``non-finite-scale`` for the first call of :func:`broken_scales`."""
    broken = broken_scales(program)
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise LoweringError(
            f"{broken[0].site}: {broken[0].reason}{more}",
            code="non-finite-scale",
            site=broken[0].site,
            hint="nothing was written; leave the layer out of the recipe with skip=...",
        )


def argument(call: fx.Node, position: int, name: str) -> Any:
    """An argument of a call by position or keyword, None if it was left at its default."""
    return call.args[position] if len(call.args) > position else call.kwargs.get(name)


F = TypeVar("F", bound=type[Format])
_families: list[type[Format]] = []


def register_format(cls: F) -> F:
    """Make a family's formats known to :func:`find_format`."""
    _families.append(cls)
    return cls


@cache
def families() -> tuple[type[Format], ...]:
    """Every family in this folder, in the order of the files' names."""
    import mopt.formats as package

    for module in sorted(iter_modules(package.__path__), key=lambda m: m.name):
        import_module(f"{package.__name__}.{module.name}")
    return tuple(sorted(_families, key=lambda cls: cls.__module__))


def list_formats() -> tuple[str, ...]:
    """The names that the families offer; more may be valid, such as other group sizes."""
    return tuple(name for family in families() for name in family.names())


def find_format(name: str) -> Format:
    """A format by name. Raises UsageError with the nearest known name."""
    for family in families():
        found = family.parse(name)
        if found is not None:
            return found
    raise unknown_name("format", name, list_formats(), ", ".join(list_formats()[:6]) + ", ...")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
