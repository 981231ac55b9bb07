"""Codes of unevenly spaced levels: small floats, NF4 and BitMoD. Mostly there to save bytes.

None but BitMoD with 3 bits has a kernel on a CPU: a runtime widens the weight when it loads the
model, so files are small, speed and memory are those of a float layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mopt.formats.base import (
    Encoded,
    Format,
    argument,
    drop_reader,
    record,
    register_format,
    require_finite,
    row_pieces,
    store,
    swap_calls,
)
from mopt.formats.grid import Grid
from mopt.formats.int_blocks import padding_reason
from mopt.layers import Layer
from mopt.levels import levels, nearest_codes
from mopt.ops import decode_levels, dequantize_blocks, pack_bits
from mopt.program import Program

# Scales from narrow to slightly wide, relative to the one at which nothing is clipped.
_FACTORS = (*(0.70 + 0.03 * i for i in range(12)), 1.4)
_FLOAT8 = ("e4m3", "e5m2")
# Every kind with the number of columns that may share a scale, the usual one first.
_GROUPS = {
    "nf4": (64, 32, 128), "mxfp4": (32,), "nvfp4": (16,), "bitmod4": (128, 32, 64),
    "bitmod3": (128, 32, 64), "twinlog4": (128, 32, 64),
}  # fmt: skip
_LEVELS = {"mxfp4": "e2m1", "nvfp4": "e2m1"}
_SCALES = {"mxfp4": "e8m0", "nvfp4": "e4m3"}
_NAME = re.compile(r"(nf4|bitmod4|bitmod3|twinlog4)(?:-g(\d+))?")


@register_format
@dataclass(frozen=True)
class LevelBlocks(Format):
    """``nf4``, ``mxfp4``, ``nvfp4``, ``bitmod4``, ``bitmod3``, ``twinlog4``, ``fp8-e4m3``, ....

    Each group of columns has a scale, fp8 one per output channel. MXFP4 stores it as a power of
    two in a byte per 32 columns, NVFP4 as an e4m3 byte per 16 times one scale for the tensor, the
    others as float32. BitMoD picks one of four tables for each group. Other group sizes are written
    ``nf4-g32``. The levels of bitmod3 are integers, so it is computed as 4-bit integers exactly,
    and takes their bytes. Twin-log (after the summary of LRQ-DiT's quantizer, with a design of its
    own: not a reproduction) has a sign and eight evenly spaced logarithms; each group picks the
    distance between them and how far the other sign reaches, a negative scale swaps the two sides.
    It has no zero. It suits weights with heavy tails. Columns that do not fill the last group are
    padded.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    operator: ClassVar[str] = "mopt::decode_levels"

    kind: str = "nf4"
    group: int = 64

    @property
    def name(self) -> str:
        if self.kind in _FLOAT8:
            return f"fp8-{self.kind}"
        return self.kind if self.group == _GROUPS[self.kind][0] else f"{self.kind}-g{self.group}"

    @property
    def bits(self) -> int:
        return levels(self.levels).bits

    @property
    def levels(self) -> str:
        """The kind of levels that codes index, see ``mopt.levels``."""
        return _LEVELS.get(self.kind, self.kind)

    @property
    def scale_kind(self) -> str:
        """How scales are stored: "float32", "e8m0" or "e4m3"."""
        return _SCALES.get(self.kind, "float32")

    @property
    def kernels(self) -> frozenset[tuple[str, str]]:
        return frozenset({("onnx", "cpu")}) if self.kind == "bitmod3" else frozenset()

    @classmethod
    def parse(cls, name: str) -> LevelBlocks | None:
        if name in ("mxfp4", "nvfp4"):
            return cls(name, _GROUPS[name][0])
        if name.removeprefix("fp8-") in _FLOAT8 and name.startswith("fp8-"):
            return cls(name.removeprefix("fp8-"), 0)
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        kind, group = found.group(1), int(found.group(2) or _GROUPS[found.group(1)][0])
        usual = found.group(2) is not None and group == _GROUPS[kind][0]
        return cls(kind, group) if group in _GROUPS[kind] and not usual else None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ("fp8-e4m3", "fp8-e5m2", *_GROUPS, "nf4-g32", "nf4-g128", "bitmod4-g32")

    def check(self, layer: Layer, weight: Tensor) -> str | None:
        reason = super().check(layer, weight)
        if reason is None and weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            return f"the weight is {kind}, {self.name} computes in float32: call model.float()"
        return reason or padding_reason(weight.shape[1], self._block(weight.shape[1]))

    def grid(
        self, weight: Tensor, *, ranges: str = "mse", importance: Tensor | None = None
    ) -> Grid:
        """Scales and tables. "min-max" clips nothing, "mse" searches the least squared error,
        weighed per column by ``importance`` (columns).
        """
        require_finite(weight)
        peaks = [weight[at].abs().amax() for at in row_pieces(weight)]
        shared = self._tensor_scale(torch.stack(peaks).amax().float())
        weigh = torch.ones(weight.shape[1]) if importance is None else importance.float()
        weigh = self._grouped(weigh[None].to(weight.device))
        parts = [self._search(weight[at], ranges, weigh, shared) for at in row_pieces(weight)]
        scales, tables = (torch.cat(both) for both in zip(*parts, strict=True))
        several = len(levels(self.levels).tables) > 1
        return Grid(scales, None, tables if several else None, shared)

    def _search(
        self, weight: Tensor, ranges: str, weigh: Tensor, shared: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scales and tables (rows, groups) of some rows."""
        x = self._grouped(weight)
        largest = x.abs().amax(-1)
        stored = self._storable(largest, shared)
        best = torch.full_like(largest, torch.inf)
        scales, tables = torch.ones_like(largest), torch.zeros_like(largest)
        found = levels(self.levels)
        for table in range(len(found.tables)):
            plain = largest / float(found.largest[table])
            for factor in self._factors(ranges):
                step = stored(plain * factor)
                error = (self._rounded(x, step, table) - x).square().mul(weigh).sum(-1)
                better = error < best
                best = torch.where(better, error, best)
                scales = torch.where(better, step, scales)
                tables = torch.where(better, float(table), tables)
        return scales, tables

    def encode(self, weight: Tensor, *, grid: Grid | None = None) -> Encoded:
        require_finite(weight)
        grid = self.grid(weight) if grid is None else grid
        pieces = (self._encode(weight[at], grid.rows(at)) for at in row_pieces(weight))
        encoded = Encoded.join(pieces, len(weight))
        if self.kind != "nvfp4":
            return encoded
        assert grid.tensor_scale is not None
        tensors = {**encoded.tensors, "tensor_scale": grid.tensor_scale}
        return Encoded(encoded.format, encoded.shape, tensors)

    def _encode(self, weight: Tensor, grid: Grid) -> Encoded:
        """Of some rows, without the scale of the whole tensor."""
        x, found = self._grouped(weight), levels(self.levels)
        ratio = _divide(x, grid.scales)
        codes = nearest_codes(ratio, self.levels)
        if grid.tables is not None:
            for table in range(1, len(found.tables)):
                chosen = (grid.tables == table).unsqueeze(-1)
                codes = torch.where(chosen, nearest_codes(ratio, self.levels, table), codes)
        if self.kind == "bitmod3":
            return self._encode_integers(weight, codes, grid)
        tensors = {"codes": pack_bits(codes, self.bits)}
        if self.scale_kind == "float32":
            tensors["scales"] = grid.scales.contiguous()
        else:
            assert grid.tensor_scale is not None
            stored = grid.scales / grid.tensor_scale
            tensors["scales"] = nearest_codes(stored, self.scale_kind).to(torch.uint8)
        if grid.tables is not None:
            tensors["tables"] = pack_bits(grid.tables.to(torch.int32), 2)
        return Encoded(self.name, tuple(weight.shape), tensors)

    def decode(self, encoded: Encoded) -> Tensor:
        scale = encoded.tensors.get("tensor_scale")
        by_row = {name: t for name, t in encoded.tensors.items() if name != "tensor_scale"}
        rows = Encoded(encoded.format, encoded.shape, by_row)
        weight = torch.empty(encoded.shape, device=by_row["codes"].device)
        for at in row_pieces(weight):
            weight[at] = self._decode(rows.rows(at).tensors, scale, encoded.shape[1])
        return weight

    def _decode(self, tensors: Mapping[str, Tensor], scale: Tensor | None, columns: int) -> Tensor:
        if self.kind == "bitmod3":
            return dequantize_blocks(tensors["codes"], tensors["scales"], None, 4, columns)
        return decode_levels(
            tensors["codes"], tensors["scales"], tensors.get("tables"), scale,
            self.levels, self.scale_kind, columns,
        )  # fmt: skip

    def size_bytes(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
        rows, columns = shape
        block = self._block(columns)
        blocks = -(-columns // block)
        of_scale = 4 if self.scale_kind == "float32" else 1
        tables = -(-blocks // 4) if self.kind in ("bitmod4", "twinlog4") else 0
        bits = 4 if self.kind == "bitmod3" else self.bits
        of_tensor = 4 if self.kind == "nvfp4" else 0
        return rows * (blocks * (block * bits // 8 + of_scale) + tables) + of_tensor

    def place(self, program: Program, layer: Layer, encoded: Encoded) -> None:
        nodes = store(program, layer, encoded)
        columns = encoded.shape[1]
        record(program, layer, self.name)
        if self.kind == "bitmod3":
            swap_calls(
                program, layer, torch.ops.mopt.linear_nbits.default,
                lambda call: (call.args[0], nodes["codes"], nodes["scales"], None,
                              argument(call, 2, "bias"), 4, columns, "int8"),
            )  # fmt: skip
            return
        for call in layer.calls:
            old = call.args[1]
            reader = program.insert_call(
                torch.ops.mopt.decode_levels.default,
                (nodes["codes"], nodes["scales"], nodes.get("tables"), nodes.get("tensor_scale"),
                 self.levels, self.scale_kind, columns),
                like=call,
            )  # fmt: skip
            call.update_arg(1, reader)
            drop_reader(program, old)

    def _factors(self, ranges: str) -> tuple[float, ...]:
        """Scales to try, relative to the one at which nothing is clipped."""
        found = (1.0, *_FACTORS) if ranges == "mse" else (1.0,)
        both = self.kind == "twinlog4"  # whose two sides differ
        return (*found, *(-factor for factor in found)) if both else found

    def _block(self, columns: int) -> int:
        return self.group or columns

    def _grouped(self, weight: Tensor) -> Tensor:
        columns = weight.shape[1]
        block = self._block(columns)
        padded = torch.nn.functional.pad(weight.float(), (0, -columns % block))
        return padded.view(len(weight), -1, block)

    def _rounded(self, x: Tensor, scales: Tensor, table: int) -> Tensor:
        codes = nearest_codes(_divide(x, scales), self.levels, table)
        return levels(self.levels).tables[table].to(x.device)[codes] * scales.unsqueeze(-1)

    def _storable(self, largest: Tensor, shared: Tensor) -> Callable[[Tensor], Tensor]:
        """What becomes of scales when they are stored; 1 where a group is all zero."""

        def stored(scales: Tensor) -> Tensor:
            if self.scale_kind == "e8m0":
                # The standard takes the power of two below largest / 4, though the largest level is
                # 6: values up to a third beyond it saturate.
                exponents = torch.floor(torch.log2(scales.double() * (1.5 + 1e-7)))
                scales = torch.exp2(exponents.clamp(-126, 126)).float()
            elif self.scale_kind == "e4m3":
                codes = nearest_codes(scales / shared, "e4m3")
                scales = levels("e4m3").tables[0].to(scales.device)[codes] * shared
            return torch.where(largest > 0, scales, torch.ones_like(scales) * self._unit(shared))

        return stored

    def _unit(self, shared: Tensor) -> Tensor:
        """A scale for a group of zeros that its storage holds exactly."""
        if self.kind == "twinlog4":  # no level is zero
            return torch.full_like(shared, 1e-30)
        return shared if self.kind == "nvfp4" else torch.ones_like(shared)

    def _tensor_scale(self, largest: Tensor) -> Tensor:
        """The scale on all scales: what lets the largest of them use e4m3's largest value."""
        if self.kind != "nvfp4":
            return torch.ones((), device=largest.device)
        scale = largest / (6 * 448)
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def _encode_integers(self, weight: Tensor, codes: Tensor, grid: Grid) -> Encoded:
        assert grid.tables is not None
        values = levels("bitmod3").tables.to(codes.device)
        chosen = values.reshape(-1)[codes + (grid.tables.long() << 3).unsqueeze(-1)]
        tensors = {
            "codes": pack_bits((chosen + 8).to(torch.int32), 4),
            "scales": grid.scales.contiguous(),
        }
        return Encoded(self.name, tuple(weight.shape), tensors)


def _divide(x: Tensor, scales: Tensor) -> Tensor:
    """x / scale per group; 0 where a scale is too small to be stored."""
    safe = torch.where(scales != 0, scales, torch.ones_like(scales)).unsqueeze(-1)
    return torch.where(scales.unsqueeze(-1) != 0, x / safe, torch.zeros_like(x))
