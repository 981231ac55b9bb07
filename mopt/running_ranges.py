"""Eight bits with ranges that follow the batches (Mesa, Pan et al., 2021).

A value is cut along its channels (attention heads, where it has them) into a few groups; each has
a least value and a width that move by a tenth of the way towards those of each batch. Codes are
rounded at random: within the range their expected value is the value; what lies outside is its end.
The ranges belong to one place in one step's graph and live as long as the process: after a restart
the first batch sets them again.
"""

from __future__ import annotations

from functools import cache
from itertools import count as numbers

import torch
from torch import Tensor

PREFIX = "int8-running"
KEPT = 0.9
_GROUPS = 8
_TOP = 255
_PIECE = 1 << 16
# By the number behind the @ of a form: least value and width [groups] on each device.
_RANGES: dict[str, tuple[Tensor, Tensor]] = {}
_numbers = numbers()


def form_for(shape: tuple[int, ...]) -> str:
    """A form with ranges of its own for values of a shape.

    With four dimensions the second one is the channels (heads, or a convolution's), else the last.
    """
    channels = shape[1] if len(shape) == 4 else shape[-1]
    inner = shape[2] * shape[3] if len(shape) == 4 else 1
    groups = next(g for g in range(min(_GROUPS, channels), 0, -1) if channels % g == 0)
    return f"{PREFIX}-{groups}x{channels // groups * inner}@{next(_numbers)}"


def _sizes(form: str) -> tuple[int, int]:
    """Groups, and how many values of a group lie side by side."""
    groups, _, run = form.partition("@")[0].removeprefix(f"{PREFIX}-").partition("x")
    return int(groups), int(run)


def packed_bytes(form: str, count: int) -> int:
    """Bytes of the codes of ``count`` values and of their ranges."""
    return -(-count // 4) * 4 + 8 * _sizes(form)[0]


def encode(value: Tensor, form: str) -> Tensor:
    """The codes, and the ranges they are within; the form's ranges have moved."""
    groups, run = _sizes(form)
    rows = value.reshape(-1, groups, run)
    low, width = _moved(form, rows)
    total = value.numel()
    out = torch.zeros(packed_bytes(form, total), dtype=torch.uint8, device=value.device)
    codes = out[:total].view(rows.shape)
    out[-8 * groups :] = torch.stack((low, width)).view(torch.uint8).flatten()
    scale = torch.where(width > 0, _TOP / width.clamp_min(1e-30), 0.0)
    generator = _generator(value.device)
    step = max(1, _PIECE // (groups * run))
    for start in range(0, len(rows), step):
        place = (rows[start : start + step].float() - low[:, None]).mul_(scale[:, None])
        drawn = torch.rand(place.shape, generator=generator, device=value.device)
        codes[start : start + step] = place.add_(drawn).floor_().clamp_(0, _TOP).to(torch.uint8)
    return out


def _moved(form: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The ranges after this batch; a range without any width is the batch's."""
    low = rows.amin((0, 2)).float()
    width = rows.amax((0, 2)).float() - low
    before = _RANGES.get(form)
    if before is not None and before[0].device == low.device:
        known = before[1] > 0
        low = torch.where(known, KEPT * before[0] + (1 - KEPT) * low, low)
        width = torch.where(known, KEPT * before[1] + (1 - KEPT) * width, width)
    _RANGES[form] = low, width
    return low, width


def decode(packed: Tensor, form: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The values of the codes."""
    groups, run = _sizes(form)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    rows = out.view(-1, groups, run)
    low, width = packed[-8 * groups :].view(torch.float32).view(2, groups, 1)
    codes = packed[: out.numel()].view(rows.shape)
    step = max(1, _PIECE // (groups * run))
    for start in range(0, len(rows), step):
        rows[start : start + step] = codes[start : start + step].float() * (width / _TOP) + low
    return out


@cache
def _generator(device: torch.device) -> torch.Generator:
    # One of its own: the model's random numbers are those of the plain step.
    return torch.Generator(device).manual_seed(0)
