"""A model made small for a quick check: fewer equal blocks, fewer words, smaller inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from mopt.frontend import normalize_inputs
from mopt.model_source import ModelSource

_KEPT = 2
# Rows of a table and entries of a dimension above which a smaller one shows as much.
_ROWS, _LENGTH = 1024, 16
_SIDES = {4: 64, 5: 16}  # of images and volumes
_BATCHES = 2


def shrunk(source: ModelSource) -> tuple[ModelSource, str]:
    """The source with a smaller copy of its model and inputs, and a word about what was done.

    - Every ``nn.ModuleList`` and ``nn.Sequential`` keeps two of each run of equal blocks.
    - Embeddings of more than 1,024 rows keep the first 1,024, and so do linear layers with as many
      outputs; ids are taken modulo that.
    - Dimensions that ``dynamic_shapes`` lets vary are cut to 16, or the least they allow; others to
      16 ids, 64 pixels, or 16 voxels a side. Two batches of calibration are kept, cut likewise.

    What the model does not run with is not done: depth or size may be part of its meaning. Weights
    that stay are shared with the given model, which is left as it is.
    """
    names = _input_names(source)
    if names is None:
        return source, "whole: its inputs have no names"
    steps = (_shorten, _shorten_fixed, _drop_blocks, _drop_words)
    small = _Small(source, names, _Cut())
    together = small.after(*steps)
    if together.notes and together.runs():
        small = together
    elif together.notes:
        for step in steps:
            tried = small.after(step)
            small = tried if tried.notes != small.notes and tried.runs() else small
        if not small.notes:
            return source, "whole: it does not run with fewer blocks or smaller inputs"
    if not small.notes:
        return source, "whole: no repeated blocks"
    return small.source, ", ".join(small.notes)


@dataclass(frozen=True)
class _Cut:
    """What is done to every set of inputs: ``sizes`` by input and dimension, ids modulo a table."""

    sizes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    rows: int | None = None

    def apply(self, raw: Any, names: list[str]) -> Any:
        args, kwargs = normalize_inputs(raw)
        new_args = tuple(self._leaf(name, value) for name, value in zip(names, args, strict=False))
        new_kwargs = {name: self._leaf(name, value) for name, value in kwargs.items()}
        return new_kwargs if new_kwargs and not new_args else new_args

    def _leaf(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for dim, size in self.sizes.get(name, {}).items():
            value = value.narrow(dim, 0, min(size, value.shape[dim]))
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if self.rows is not None and whole:
            value = value % self.rows
        return value.contiguous()


@dataclass(frozen=True)
class _FewBatches:
    """The first batches of the user's, cut."""

    given: Iterable[Any]
    cut: _Cut
    names: list[str]

    def __iter__(self) -> Iterator[Any]:
        for batch in islice(self.given, _BATCHES):
            yield self.cut.apply(batch, self.names)


@dataclass(frozen=True)
class _Small:
    """A source that was made smaller so far."""

    given: ModelSource
    names: list[str]
    cut: _Cut
    model: nn.Module | None = None
    notes: tuple[str, ...] = ()

    def after(self, *steps: Any) -> _Small:
        """Another one, with these steps done to a copy of the model."""
        model = self.model or self.given.model
        # Weights are only read, and may be most of the memory.
        shared = {id(weight): weight for weight in model.parameters()}
        small = replace(self, model=copy.deepcopy(model, shared))
        for step in steps:
            note, cut = step(small)
            if note:
                small = replace(small, cut=cut, notes=(*small.notes, note))
        return small

    @property
    def source(self) -> ModelSource:
        calibration = self.given.calibration
        if calibration is not None:
            calibration = _FewBatches(calibration, self.cut, self.names)
        return replace(
            self.given, model=self.model, calibration=calibration,
            example_inputs=self.cut.apply(self.given.example_inputs, self.names),
        )  # fmt: skip

    def runs(self) -> bool:
        source = self.source
        args, kwargs = normalize_inputs(source.example_inputs)
        modes = [(module, module.training) for module in source.model.modules()]
        try:
            with torch.no_grad():
                source.model.eval()(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
            return False
        finally:
            for module, training in modes:
                module.training = training
        return True


def _input_names(source: ModelSource) -> list[str] | None:
    """The names of the example's inputs in their order; None where ``*args`` take them."""
    args, _ = normalize_inputs(source.example_inputs)
    named = [
        name for name, parameter in inspect.signature(source.model.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    return named[: len(args)] if len(named) >= len(args) else None


def _drop_blocks(small: _Small) -> tuple[str, _Cut]:
    assert small.model is not None
    dropped = _drop_equal(small.model)
    word = "block" if dropped == 1 else "blocks"
    return (f"{dropped} repeated {word} left out" if dropped else ""), small.cut


def _drop_equal(model: nn.Module) -> int:
    dropped = 0
    if isinstance(model, nn.ModuleList | nn.Sequential):
        kinds = [_kind(block) for block in model]
        for index in range(len(kinds) - 1, _KEPT - 1, -1):
            if len(set(kinds[index - _KEPT : index + 1])) == 1:
                del model[index]
                dropped += 1
    return dropped + sum(_drop_equal(child) for child in model.children())


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What two equal blocks have in common: everything but the values of their weights."""
    shapes = tuple((name, tuple(value.shape)) for name, value in block.state_dict().items())
    return type(block), repr(block), shapes


def _drop_words(small: _Small) -> tuple[str, _Cut]:
    """Cut large tables and the layers that score their rows, which may share one weight."""
    assert small.model is not None
    tables = [m for m in small.model.modules()
              if isinstance(m, nn.Embedding) and m.num_embeddings > _ROWS]  # fmt: skip
    sizes = {table.num_embeddings for table in tables}
    heads = [m for m in small.model.modules()
             if isinstance(m, nn.Linear) and m.out_features in sizes]  # fmt: skip
    made: dict[int, nn.Parameter] = {}

    def cut(weight: nn.Parameter) -> nn.Parameter:
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(weight.detach()[:_ROWS].clone(), weight.requires_grad)
        return made[id(weight)]

    for table in tables:
        table.weight, table.num_embeddings = cut(table.weight), _ROWS
        if table.padding_idx is not None:
            table.padding_idx %= _ROWS
    for head in heads:
        head.weight, head.out_features = cut(head.weight), _ROWS
        if head.bias is not None:
            head.bias = cut(head.bias)
    if not tables:
        return "", small.cut
    return f"{max(sizes):,} words cut to {_ROWS:,}", replace(small.cut, rows=_ROWS)


def _shorten(small: _Small) -> tuple[str, _Cut]:
    """Cut the dimensions that may vary, together where they have one name."""
    tensors = _tensors(small)
    uses: dict[Any, list[tuple[str, int, Dim]]] = {}
    for name, dims in _promised(small, tensors).items():
        for dim, size in dims.items():
            if isinstance(size, Dim):
                uses.setdefault(_root(size).__name__, []).append((name, dim, size))
    sizes: dict[str, dict[int, int]] = {}
    for places in uses.values():
        for name, dim, size in _smaller(places, tensors):
            sizes.setdefault(name, {})[dim] = size
    return _with_sizes(small, tensors, sizes)


def _shorten_fixed(small: _Small) -> tuple[str, _Cut]:
    """Cut rows of ids, images and volumes of one size: who runs with smaller ones shows as much."""
    tensors = _tensors(small)
    promised = _promised(small, tensors)
    sizes: dict[str, dict[int, int]] = {}
    for name, value in tensors.items():
        if value.dim() == 2 and not value.is_floating_point():
            found = {1: _LENGTH}
        else:
            found = dict.fromkeys(range(2, value.dim()), _SIDES.get(value.dim(), 0))
        large = all(value.shape[dim] >= 2 * size > 0 for dim, size in found.items())
        if found and large and not found.keys() & promised[name].keys():
            sizes[name] = found
    return _with_sizes(small, tensors, sizes)


def _with_sizes(
    small: _Small, tensors: Mapping[str, Tensor], sizes: Mapping[str, Mapping[int, int]]
) -> tuple[str, _Cut]:
    changed = [name for name, dims in sizes.items()
               if any(tensors[name].shape[dim] > size for dim, size in dims.items())]  # fmt: skip
    note = f"inputs cut to {', '.join(_shape(tensors[n], sizes[n]) for n in changed)}"
    both = {name: {**small.cut.sizes.get(name, {}), **sizes.get(name, {})} for name in tensors}
    return (note if changed else ""), replace(small.cut, sizes=both)


def _tensors(small: _Small) -> dict[str, Tensor]:
    args, kwargs = normalize_inputs(small.given.example_inputs)
    values = {**dict(zip(small.names, args, strict=True)), **kwargs}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _promised(small: _Small, tensors: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """What ``dynamic_shapes`` says of each dimension of each input."""
    shapes = small.given.dynamic_shapes
    if isinstance(shapes, tuple | list):
        shapes = dict(zip(small.names, shapes, strict=False))
    shapes = shapes if isinstance(shapes, Mapping) else {}
    return {name: _by_dimension(shapes.get(name)) for name in tensors}


def _by_dimension(shape: Any) -> dict[int, Any]:
    if isinstance(shape, Mapping):
        return {dim: size for dim, size in shape.items() if isinstance(dim, int)}
    if isinstance(shape, tuple | list):
        return {dim: size for dim, size in enumerate(shape) if size is not None}
    return {}


def _root(size: Any) -> Any:
    """The dimension that a derived one, such as ``16 * height``, is made from."""
    return getattr(size, "root", size)


def _smaller(
    places: list[tuple[str, int, Dim]], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, int, int]]:
    """A size for each place of one named dimension, or nothing where none is smaller."""
    root: Any = _root(places[0][2])
    least = max(int(root.min), 2)
    best = None
    for factor in range(least, max(least, _LENGTH) + 1):
        sizes = [_size(dim, factor) for _, _, dim in places]
        fits = all(size <= tensors[name].shape[at]
                   for size, (name, at, _) in zip(sizes, places, strict=True))  # fmt: skip
        if fits and (best is None or max(sizes) <= 2 * _LENGTH):
            best = sizes
    for (name, at, _), size in zip(places, best or (), strict=False):
        yield name, at, size


def _size(dim: Any, factor: int) -> int:
    return int(dim.fn(factor)) if hasattr(dim, "root") else factor


def _shape(value: Tensor, sizes: Mapping[int, int]) -> str:
    return "x".join(str(min(size, sizes.get(at, size))) for at, size in enumerate(value.shape))
