"""The memory plan as an artifact holds it, checked before anything is placed by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopt.backends.eager.out_calls import WAYS
from mopt.errors import ArtifactError, quote

PLAN = "plan.json"
SCHEMA = 1
# Larger arenas than any machine has are refused before they are asked for.
_LARGEST = 1 << 46


@dataclass(frozen=True)
class Spec:
    """Sizes, strides and dtype of one tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def suits(self, value: Tensor) -> bool:
        """Whether a tensor looks like this; strides of axes with one element do not matter."""
        return (
            tuple(value.shape) == self.shape
            and value.dtype == self.dtype
            and all(
                size <= 1 or a == b
                for size, a, b in zip(self.shape, value.stride(), self.stride, strict=True)
            )
        )

    def copy_of(self, value: Tensor) -> Tensor:
        """A tensor of the same sizes and values with these strides."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).copy_(value)

    @property
    def bytes(self) -> int:
        """From the first to the last element."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where a call writes its result, and how it is run so that it does.

    Without an ``offset`` the place is the memory of the buffer ``shares``, which lies beside the
    arena, or without that memory of its own, made when the call runs.
    """

    offset: int | None
    shares: str | None
    spec: Spec
    call: str

    def view_of(self, arena: Tensor) -> Tensor:
        """The result's tensor in the arena."""
        assert self.offset is not None, "the result lies beside the arena"
        part = arena[self.offset : self.offset + self.spec.bytes]
        return part.view(self.spec.dtype).as_strided(self.spec.shape, self.spec.stride)


@dataclass(frozen=True)
class MemoryLayout:
    """What an executor reads of a plan: by node name, but for ``inputs`` (None: no tensor).

    ``lies_in`` is the buffer of every value that lies in one.
    """

    arena_bytes: int
    beside_bytes: int
    places: Mapping[str, Place]
    calls: frozenset[str]
    specs: Mapping[str, Spec]
    lies_in: Mapping[str, str]
    inputs: tuple[Spec | None, ...]
    dynamic: bool


def read_layout(data: Any) -> MemoryLayout:
    """The layout of a plan that was made for this backend.

    Raises ArtifactError: ``plan-schema``, or ``malformed-plan`` with what is wrong: a place
    outside the arena or off its dtype's grid, an unknown way to run a call, wrong types.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ArtifactError("the memory plan has another schema", code="plan-schema")
    try:
        return _read(data)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"malformed memory plan: {error!r}", code="malformed-plan") from error


def _read(data: dict[str, Any]) -> MemoryLayout:
    arena = _count(data["arena_bytes"])
    calls = {str(step["node"]): str(step["call"]) for step in data["steps"]}
    rows = {str(row["id"]): row for row in data["buffers"]}
    specs, places, lies_in = {}, {}, {}
    for name, views in data["values"].items():
        if len(views) == 1:
            specs[name] = _spec(views[0])
            lies_in[name] = str(views[0]["buffer"])
        if name in rows and name in calls:
            place = _place(name, rows, specs, calls[name], arena)
            places.update({} if place is None else {name: place})
    inputs = tuple(
        None if name is None else _spec(data["values"][name][0]) for name in data["inputs"]
    )
    return MemoryLayout(
        arena, _count(data["beside_bytes"]), places, frozenset(calls), specs, lies_in, inputs,
        data["dynamic"] is True,
    )  # fmt: skip


def _place(
    name: str, rows: Mapping[str, Any], specs: Mapping[str, Spec], call: str, arena: int
) -> Place | None:
    """Where a call writes; None for a result beside the arena that the call allocates itself."""
    row = rows[name]
    inside = row["where"] == "arena"
    if call not in WAYS and (inside or call):
        raise ValueError(f"{quote(name)} is run by {quote(call)}, which is no known way")
    if not call:
        return None
    spec = specs[name]
    if not inside:
        shares = row["shares"]
        # Only what a call of this plan allocates may be written over.
        if shares is not None and rows[shares]["where"] != "beside":
            raise ValueError(f"{quote(name)} is to be written over {quote(shares)}")
        return Place(None, shares, spec, call)
    offset = _count(row["offset"])
    if offset + spec.bytes > arena or offset % spec.dtype.itemsize:
        raise ValueError(f"{quote(name)} at {offset} does not fit in {arena} bytes")
    return Place(offset, None, spec, call)


def _spec(view: Mapping[str, Any]) -> Spec:
    dtype = getattr(torch, view["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{quote(view['dtype'])} is no dtype")
    shape, stride = tuple(map(_count, view["shape"])), tuple(map(_count, view["stride"]))
    if len(shape) != len(stride):
        raise ValueError("sizes and strides differ in number")
    return Spec(shape, stride, dtype)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        raise ValueError(f"{quote(value)} is no count of bytes or elements")
    return value
