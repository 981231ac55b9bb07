"""What the passes that encode one layer at a time share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopt.cache import library_versions, source_hash
from mopt.formats import Encoded, Format, Grid, GridFormat
from mopt.formats.base import require_finite, row_pieces
from mopt.formats.level_blocks import LevelBlocks
from mopt.hashes import tensor_hash
from mopt.layers import Layer, find_layers
from mopt.machine import trim_heap
from mopt.pass_base import Pass, PassContext, PassResult, Skip
from mopt.program import Program
from mopt.verdicts import check_key

_BUCKET = "encoded"
_SHAPE, _FORM, _ORDER = "shape of the weight", "format of the weight", "order of the tensors"


def encode_layers(
    one: Pass,
    program: Program,
    ctx: PassContext,
    kinds: tuple[str, ...],
    choose: Callable[[Layer, Tensor], Format | str],
    ranges: str,
) -> PassResult:
    """Encode every selected layer of ``kinds`` in the format that ``choose`` returns.

    ``choose`` may return a reason instead, and the format's own check may give one: the layer is
    then skipped with it. Raises InputError for a weight that holds NaN or infinity.
    """
    layers = [layer for layer in find_layers(program) if layer.kind in kinds]
    formats: dict[str, str] = {}
    error: dict[str, float] = {}
    skipped: list[Skip] = []
    for index, layer in enumerate(layers):
        ctx.progress.step(index, len(layers), "layers")
        ctx.check_time(f"encoding {layer.path}")
        if not one.selects(layer.path):
            continue
        weight = program.weight(layer.weight)
        require_finite(weight, layer.path, layer.source)
        chosen = choose(layer, weight)
        reason = chosen if isinstance(chosen, str) else chosen.check(layer, weight)
        if isinstance(chosen, str) or reason:
            skipped.append(Skip(layer.path, str(reason)))
            continue
        encoded, _ = encode_once(
            one, ctx, chosen, [weight], partial(_encode, chosen, weight, ranges), ranges
        )
        error[layer.path] = encoding_error(chosen, weight, encoded)
        formats[layer.path] = chosen.name
        chosen.place(program, layer, encoded)
        trim_heap()
    stats: dict[str, Any] = {"layers": len(formats), "formats": formats, "weight_error": error}
    return PassResult(changed=bool(formats), stats=stats, skipped=skipped)


def _encode(chosen: Format, weight: Tensor, ranges: str) -> tuple[Encoded, dict[str, Any]]:
    grid: Grid | None = None
    if isinstance(chosen, GridFormat | LevelBlocks):
        grid = chosen.grid(weight, ranges=ranges)
    return chosen.encode(weight, grid=grid), {}


def encode_once(
    one: Pass,
    ctx: PassContext,
    form: Format,
    read: Sequence[Tensor],
    make: Callable[[], tuple[Encoded, Mapping[str, Any]]],
    *more: str,
) -> tuple[Encoded, Mapping[str, Any]]:
    """What ``make`` gives, from the cache where it was made before, so that a compile that was
    interrupted goes on where it was.

    ``read`` are the tensors it depends on and ``more`` what else, besides the options of ``one``.
    """
    if ctx.cache is None:
        return make()
    key = encoding_key(one, ctx, form, read, *more)
    found, said = ctx.cache.remember_tensors(_BUCKET, key, partial(_as_tensors, make))
    return _as_encoded(found, said)


def encoding_key(
    one: Pass, ctx: PassContext, form: Format, read: Sequence[Tensor], *more: str
) -> dict[str, Any]:
    """What an encoding is kept under: everything it depends on."""
    return {
        "pass": one.pass_name,
        "options": options_of(one),
        "format": form.name,
        "read": [tensor_hash(tensor) for tensor in read],
        "more": list(more),
        "source": pass_sources(),
        "libraries": library_versions(),
        "threads": torch.get_num_threads(),
        "seed": ctx.seed,
    }


def keep_encoding(
    ctx: PassContext, key: Mapping[str, Any], make: Callable[[], tuple[Encoded, Mapping[str, Any]]]
) -> tuple[Encoded, Mapping[str, Any]]:
    """As :func:`encode_once` under a known key, kept however fast it was made."""
    if ctx.cache is None:
        return make()
    return _as_encoded(
        *ctx.cache.remember_tensors(_BUCKET, key, partial(_as_tensors, make), always=True)
    )


def find_encoding(
    ctx: PassContext, key: Mapping[str, Any]
) -> tuple[Encoded, Mapping[str, Any]] | None:
    """What is kept under ``key``, or None."""
    found = None if ctx.cache is None else ctx.cache.find_tensors(_BUCKET, key)
    return None if found is None else _as_encoded(*found)


def data_key(one: Pass, program: Program, ctx: PassContext, **more: Any) -> dict[str, Any] | None:
    """What is kept under this was found by ``one`` on ``program`` and the calibration data.

    None without a cache or where the program holds what has no content to go by.
    """
    if ctx.cache is None or ctx.calibration is None:
        return None
    batches = ctx.calibration.for_part(program)
    return check_key([program], batches, one.pass_name, options=options_of(one), seed=ctx.seed,
                     passes=pass_sources(), limit=ctx.max_memory_bytes, **more)  # fmt: skip


def options_of(one: Pass) -> dict[str, Any]:
    """The options of a pass that decide what a layer becomes, not which layers it takes."""
    where = {"layers", "skip", "optional"}
    return {name: value for name, value in one.options().items() if name not in where}


def pass_sources() -> str:
    """A hash of the files that decide what a weight becomes."""
    return source_hash(*_sources())


def _as_tensors(
    make: Callable[[], tuple[Encoded, Mapping[str, Any]]],
) -> tuple[Mapping[str, Tensor], Any]:
    encoded, said = make()
    facts = {_SHAPE: list(encoded.shape), _FORM: encoded.format, _ORDER: list(encoded.tensors)}
    return encoded.tensors, {**said, **facts}


def _as_encoded(
    found: Mapping[str, Tensor], remarks: Mapping[str, Any]
) -> tuple[Encoded, Mapping[str, Any]]:
    said = dict(remarks)
    shape, name, order = (said.pop(fact) for fact in (_SHAPE, _FORM, _ORDER))
    # In the order they were made in: the graph lists them so.
    return Encoded(name, tuple(shape), {part: found[part] for part in order}), said


@cache
def _sources() -> tuple[str, ...]:
    """The files that decide what a weight becomes."""
    import mopt.formats
    import mopt.passes.quantize

    folders = (*mopt.formats.__path__, *mopt.passes.quantize.__path__)
    return tuple(sorted(str(path) for folder in folders for path in Path(folder).glob("*.py")))


def encoding_error(form: Format, weight: Tensor, encoded: Encoded) -> float:
    """The relative error of an encoding, decoded some rows at a time where that is possible."""
    if not encoded.is_by_rows:
        return relative_error(weight, form.decode(encoded))
    total = wrong = 0.0
    for at in row_pieces(weight):
        rows = weight[at].float()
        difference = rows - form.decode(encoded.rows(at)).float()
        total += float(rows.square().sum(dtype=torch.float64))
        wrong += float(difference.square().sum(dtype=torch.float64))
    return wrong / total if total > 0 else wrong


def relative_error(weight: Tensor, decoded: Tensor) -> float:
    """Squared error over the weight's own square sum: 0 is exact, 1 is as bad as all zeros."""
    total = wrong = 0.0
    for at in row_pieces(weight):
        reference = weight[at].double()
        total += float(reference.square().sum())
        wrong += float((decoded[at].double() - reference).square().sum())
    return wrong / total if total > 0 else wrong


def is_small(layer: Layer, min_size: int) -> str | None:
    """The reason to leave a small layer alone, or None."""
    size = torch.Size(layer.shape).numel()
    if size < min_size:
        return f"{size} weights are fewer than min_size {min_size}"
    return None


def per_column(per_group: Tensor, columns: int, group: int) -> Tensor:
    """Values (rows, groups) spread over the columns of their groups, float32."""
    return per_group.float().repeat_interleave(group, dim=1)[:, :columns]


def kernel_notice(form: Format, backend: str) -> str | None:
    """What to say at once about a format that the backend computes with as floats, or None."""
    # The Triton backend says layer by layer what it has no kernel for.
    if backend in ("eager", "triton") or (backend, "cpu") in form.kernels:
        return None
    return (
        f"{form.name} has no kernel on this target: the file becomes smaller, speed and "
        "memory stay those of the float model"
    )
