"""Integer codes in blocks along the input features: the layout of ONNX Runtime's MatMulNBits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mopt.flops import ModelSize, size_hint
from mopt.formats.base import (
    Encoded,
    GridFormat,
    argument,
    record,
    register_format,
    require_finite,
    round_codes,
    row_pieces,
    store,
    swap_calls,
)
from mopt.formats.grid import SCALE_FLOOR, Grid, search_grid, values_at_a_time
from mopt.layers import Layer
from mopt.ops import dequantize_blocks, pack_bits, pack_zero_points
from mopt.program import Program

GROUPS = (16, 32, 64, 128)
_NAME = re.compile(r"int([2348])-(?:g(\d+)|(channel))(-asym)?(-afloat)?")
# Where a kernel that reads codes stops being faster than one that reads floats.
_FEW_ROWS, _SOME_ROWS = 8, 32
_LONG_GROUP = 128
_WIDE = 2048 * 2048
_LARGE_BYTES = 1 << 30
# What a processor computes while it reads a byte, in order of magnitude, and the share of a model's
# time below which a layer is not worth a kernel that rounds its input.
_FLOPS_PER_BYTE = 10
_MINOR = 0.01
# Largest share of codes that may be padding: beyond it a smaller group is the better format.
_MAX_PADDING = 0.25


@register_format
@dataclass(frozen=True)
class IntBlocks(GridFormat):
    """``int4-g32``, ``int8-g128-asym``, ``int4-channel-afloat``, ...: 2, 4 or 8 bits in groups.

    3 bits (``int3-g128``) have no kernel of their own: their codes are stored in, and computed with
    as, 4 bits, so they take the bytes of int4 and are there to measure what 3 bits cost.

    ``group`` columns share a scale (and a zero point when ``asymmetric``); 0 means a scale per
    output channel, which is stored once per block because the kernel reads it so. ``activations``
    "int8" allows a kernel to round each row and block of the input to 8 bits, "float" forbids it.
    Calls with many rows compute in float either way, see :meth:`keeps_codes`. Scales take the
    weight's dtype. Columns that do not fill the last block are padded.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    operator: ClassVar[str] = "mopt::linear_nbits"

    width: int = 4
    group: int = 32
    asymmetric: bool = False
    activations: str = "int8"

    @property
    def name(self) -> str:
        group = f"g{self.group}" if self.group else "channel"
        asymmetric = "-asym" if self.asymmetric else ""
        activations = "-afloat" if self.activations == "float" else ""
        return f"int{self.width}-{group}{asymmetric}{activations}"

    @property
    def bits(self) -> int:
        return self.width

    @property
    def storage(self) -> int:
        """Bits that a code takes in memory."""
        return 4 if self.width == 3 else self.width

    @property
    def kernels(self) -> frozenset[tuple[str, str]]:
        # Measured on ONNX Runtime 1.31: with float activations, 8- and 2-bit weights take a path
        # about a hundred times slower than the one for 8-bit activations.
        if self.activations == "float" and self.storage != 4:
            return frozenset()
        return frozenset({("onnx", "cpu")})

    @classmethod
    def parse(cls, name: str) -> IntBlocks | None:
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        bits, group, _, asymmetric, floating = found.groups()
        if group is not None and int(group) not in GROUPS:
            return None
        return cls(int(bits), int(group or 0), bool(asymmetric), "float" if floating else "int8")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        groups = [f"g{group}" for group in GROUPS]
        plain = [f"int{bits}-{group}" for bits in (4, 8, 2) for group in [*groups, "channel"]]
        return (*plain, *(f"{name}-asym" for name in plain))

    def block(self, columns: int) -> int:
        """Columns per stored block: the group, or for per-channel scales what takes least bytes."""
        if self.group:
            return self.group
        return min(reversed(GROUPS), key=lambda g: -(-columns // g) * (g * self.storage // 8 + 4))

    def group_of(self, columns: int) -> int:
        return self.group or columns

    def check(self, layer: Layer, weight: Tensor) -> str | None:
        reason = super().check(layer, weight)
        if reason:
            return reason
        if weight.dtype == torch.float64:
            return f"the weight is float64, {self.name} computes in 32 bits: call model.float()"
        return padding_reason(weight.shape[1], self.block(weight.shape[1]))

    def grid(
        self, weight: Tensor, *, ranges: str = "mse", importance: Tensor | None = None
    ) -> Grid:
        require_finite(weight)
        group = self.group or weight.shape[1]
        found = search_grid(
            weight, group, self.width, symmetric=not self.asymmetric, ranges=ranges,
            importance=importance,
        )  # fmt: skip
        return Grid(_storable(found.scales, weight.dtype), found.zero_points)

    def encode(self, weight: Tensor, *, grid: Grid | None = None) -> Encoded:
        require_finite(weight)
        grid = self.grid(weight) if grid is None else grid
        slices = row_pieces(weight, values_at_a_time())
        pieces = (self._encode(weight[at], grid.rows(at)) for at in slices)
        return Encoded.join(pieces, len(weight))

    def _encode(self, weight: Tensor, grid: Grid) -> Encoded:
        rows, columns = weight.shape
        block = self.block(columns)
        blocks = -(-columns // block)
        scales, zeros = grid.scales.float(), grid.zero_points
        if not self.group:
            scales = scales.expand(rows, blocks)
            zeros = zeros.expand(rows, blocks) if zeros is not None else None
        padded = torch.nn.functional.pad(weight.float(), (0, blocks * block - columns))
        codes = round_codes(
            padded.view(rows, blocks, block),
            scales.unsqueeze(-1),
            zeros.unsqueeze(-1) if zeros is not None else None,
            self.width,
        )
        if zeros is None:  # the operator's zero point is in the middle of the stored range
            codes = codes + (2 ** (self.storage - 1) - 2 ** (self.width - 1))
        tensors = {
            "codes": pack_bits(codes.to(torch.int32), self.storage),
            "scales": scales.to(weight.dtype).contiguous(),
        }
        if zeros is not None:
            tensors["zero_points"] = pack_zero_points(zeros.to(torch.int32), self.storage)
        return Encoded(self.name, tuple(weight.shape), tensors)

    def decode(self, encoded: Encoded) -> Tensor:
        scales = encoded.tensors["scales"]
        weight = torch.empty(encoded.shape, dtype=scales.dtype, device=scales.device)
        for at in row_pieces(weight):
            part = encoded.rows(at).tensors
            weight[at] = dequantize_blocks(
                part["codes"], part["scales"], part.get("zero_points"), self.storage,
                encoded.shape[1],
            )  # fmt: skip
        return weight

    def size_bytes(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
        rows, columns = shape
        block = self.block(columns)
        blocks = -(-columns // block)
        zeros = -(-blocks * self.storage // 8) if self.asymmetric else 0
        return rows * (blocks * (block * self.storage // 8 + dtype.itemsize) + zeros)

    def keeps_codes(self, rows: int, shape: tuple[int, ...], model: ModelSize) -> bool:
        """Whether a call reads the codes as they are: where a kernel for them is faster.

        ``rows`` are the vectors it multiplies with the (N, K) weight. Where it is not, the weight
        is widened when the model is loaded: the file is as small, and nothing is slower. So is the
        weight of a call whose time is nothing beside the model's, such as the classifier that reads
        one vector of an image: codes would save no time there, and their kernel rounds its input.
        Models of more than 1 GiB keep their codes, because memory is what they are short of.

        Measured on ONNX Runtime 1.31 by ``benchmarks/block_kernels.py`` (AVX-512 VNNI), at 8 rows
        0.3 to 1.0 of the time in every size from 256 x 688 on; at 16, 0.9 for 2048 x 2048 and 1.2
        for 768 x 768; at 256, 1.2 to 1.8 with groups of 32, but 0.8 to 0.9 with groups of 128 from
        768 x 3072 on.
        """
        if model.bytes > _LARGE_BYTES:
            return True
        if rows <= _FEW_ROWS:
            return _FLOPS_PER_BYTE * 4 * prod(shape) >= _MINOR * model.flops
        long_groups = self.block(shape[1]) >= _LONG_GROUP
        if rows <= _SOME_ROWS:
            return prod(shape) >= (_WIDE // 4 if long_groups else _WIDE)
        return long_groups and prod(shape) >= _WIDE // 2

    def place(self, program: Program, layer: Layer, encoded: Encoded) -> None:
        nodes = store(program, layer, encoded)
        columns = encoded.shape[1]
        whole = program.original_size()

        def arguments(call: fx.Node) -> tuple[Any, ...]:
            rows = prod(size_hint(size) for size in call.meta["val"].shape[:-1])
            kept = self.keeps_codes(rows, encoded.shape, whole)
            activations = self.activations if kept else "float"
            return (
                call.args[0], nodes["codes"], nodes["scales"], nodes.get("zero_points"),
                argument(call, 2, "bias"), self.storage, columns, activations,
            )  # fmt: skip

        swap_calls(program, layer, torch.ops.mopt.linear_nbits.default, arguments)
        record(program, layer, self.name)


def padding_reason(columns: int, block: int) -> str | None:
    """Why blocks of that length would waste too much on padding, or None."""
    padding = 1 - columns / (-(-columns // block) * block)
    if padding <= _MAX_PADDING:
        return None
    fitting = [group for group in GROUPS if columns % group == 0]
    hint = f"group={max(fitting)} fits" if fitting else "leave the layer out"
    return f"in_features {columns} in groups of {block} would store {padding:.0%} padding; {hint}"


def _storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as the dtype can hold them, in float32: not rounded to zero or infinity."""
    if dtype == torch.float32 or dtype == torch.float64:
        return scales
    limits = torch.finfo(dtype)
    # Subnormal float16 scales keep at least 6 bits, which costs less than flattening the group.
    floor = max(limits.smallest_normal / 64, SCALE_FLOOR)
    magnitude = scales.abs().clamp(floor, limits.max).to(dtype).float()
    return magnitude * scales.sign()
