"""fp8 (E4M3) with two granularities, as COAT keeps activations (Xi et al., ICLR 2025).

What backward only multiplies as a matrix has one scale for the whole tensor, as tensor cores take
it; anything else has a scale for each 16 values of a row, so that a row with outliers spoils no
other one. Scales of groups are in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mopt.flops import shape_of
from mopt.joint_tags import is_backward
from mopt.row_sampling import views_of

aten = torch.ops.aten
PREFIX = "fp8-mixed"
TENSOR, GROUPS = f"{PREFIX}-tensor", f"{PREFIX}-groups"
SIZE = 16
_TOP = 448.0
_PIECE = 1 << 16
_PRODUCTS = (
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution_backward.default,
)  # fmt: skip


def form_for(node: fx.Node) -> str:
    """The granularity for a value, by what backward does with it."""
    own = views_of(node)
    readers = {user for view in own for user in view.users if user not in own and is_backward(user)}
    if all(user.target in _PRODUCTS for user in readers) or shape_of(node.meta["val"])[-1] % SIZE:
        return TENSOR
    return GROUPS


def packed_bytes(form: str, count: int) -> int:
    """Bytes of the codes of ``count`` values and of their scales."""
    return -(-count // 4) * 4 + (4 if form == TENSOR else 2 * (count // SIZE))


def encode(value: Tensor, form: str) -> Tensor:
    """Codes and scales."""
    total = value.numel()
    rows = value.reshape(1, total) if form == TENSOR else value.reshape(-1, SIZE)
    out = torch.zeros(packed_bytes(form, total), dtype=torch.uint8, device=value.device)
    codes, scales = _parts(out, form, total)
    top = torch.stack((rows.amax(1), -rows.amin(1))).amax(0).float()
    scales[:] = (top / _TOP).clamp_min_(1e-30)
    if form == TENSOR:
        codes, rows, scales = codes.view(-1, 1), rows.view(-1, 1), scales.expand(total)
    step = _PIECE // rows.shape[1]
    for start in range(0, len(rows), step):
        scale = scales[start : start + step, None].float()
        # A scale rounded down leaves at most 449, which still rounds to 448 and not to NaN.
        found = rows[start : start + step].float() / scale
        codes[start : start + step] = found.to(torch.float8_e4m3fn).view(torch.uint8)
    return out


def decode(packed: Tensor, form: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The values of the codes."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    total = out.numel()
    codes, scales = _parts(packed, form, total)
    rows = out.view(-1, 1 if form == TENSOR else SIZE)
    if form == TENSOR:
        codes, scales = codes.view(-1, 1), scales.expand(total)
    step = _PIECE // rows.shape[1]
    for start in range(0, len(rows), step):
        part = codes[start : start + step].view(torch.float8_e4m3fn).float()
        rows[start : start + step] = part.mul_(scales[start : start + step, None].float())
    return out


def _parts(packed: Tensor, form: str, total: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, values] and scales [rows] within the bytes."""
    start = -(-total // 4) * 4
    if form == TENSOR:
        return packed[:total].view(1, total), packed[start:].view(torch.float32)
    return packed[:total].view(-1, SIZE), packed[start:].view(torch.bfloat16)
