"""Some rows of a value that stand for all of them in a weight's gradient, without bias.

WTA-CRS (Liu et al., NeurIPS 2023): of ``k`` rows the heaviest are kept as they are, the rest is
drawn with replacement by the rows' norms and scaled, so that the expected value is the value. What
is linear in the value, as the gradient of a linear layer's weight is, has the right expectation.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx

from mopt.flops import shape_of
from mopt.joint_tags import is_backward

aten = torch.ops.aten
PREFIX = "rows"
_SHARE = 0.3
_LEAST_ROWS = 10
_VIEWS = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default,
    aten.transpose.int, aten.permute.default, aten.expand.default, aten.alias.default,
    aten.detach.default,
)  # fmt: skip


def form_of(width: int) -> str:
    """The name of the form for rows of ``width`` values."""
    return f"{PREFIX}{width}"


def _sizes(form: str, count: int) -> tuple[int, int, int]:
    """Rows, values in each, and rows that are kept."""
    width = int(form.removeprefix(PREFIX))
    rows = count // width
    return rows, width, min(rows, max(int(_SHARE * rows), _LEAST_ROWS))


def sampled_bytes(form: str, count: int) -> int:
    """Bytes of the kept rows in float32 and of their places."""
    _, width, kept = _sizes(form, count)
    return kept * (4 * width + 4)


def sample(value: Tensor, form: str, seed: int | None = None) -> Tensor:
    """The kept rows, scaled, and their places, as uint8 of one dimension."""
    rows, width, kept = _sizes(form, value.numel())
    flat = value.reshape(rows, width)
    norms = flat.float().norm(dim=1)
    total = norms.sum()
    out = torch.zeros(sampled_bytes(form, value.numel()), dtype=torch.uint8, device=value.device)
    places = out[4 * kept * width :].view(torch.int32)
    part = out[: 4 * kept * width].view(torch.float32).view(kept, width)
    if not bool(total > 0):
        return out
    share, order = (norms / total).sort(descending=True)
    before = share.cumsum(0) - share
    # The number of rows kept as they are: least variance of the rest (eq. 7 there).
    spread = (1 - before[:kept]).clamp_min(0) / (kept - torch.arange(kept, device=value.device))
    sure = int(spread.argmin())
    rest = share[sure:]
    left = rest.sum()
    places[:sure] = order[:sure].int()
    part[:sure] = flat[order[:sure]].float()
    if bool(left > 0):
        generator = _generator(value.device)
        if seed is not None:
            generator.manual_seed(seed)
        drawn = torch.multinomial(rest, kept - sure, replacement=True, generator=generator)
        scale = left / (rest[drawn] * (kept - sure))
        places[sure:] = order[sure + drawn].int()
        part[sure:] = flat[order[sure + drawn]].float() * scale[:, None]
    return out


def spread_out(packed: Tensor, form: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The value with zeros where rows were not kept: its expected value is the value."""
    count = 1
    for size in shape:
        count *= size
    rows, width, kept = _sizes(form, count)
    part = packed[: 4 * kept * width].view(torch.float32).view(kept, width)
    places = packed[4 * kept * width :].view(torch.int32).long()
    found = torch.zeros(rows, width, dtype=dtype, device=packed.device)
    return found.index_add_(0, places, part.to(dtype)).view(shape)


@cache
def _generator(device: torch.device) -> torch.Generator:
    # One of its own: the model's random numbers are those of the plain step.
    return torch.Generator(device).manual_seed(0)


def only_sums_rows(node: fx.Node) -> bool:
    """Whether backward reads a value only to multiply it with a gradient, summed over its rows."""
    shape = shape_of(node.meta["val"])
    width = shape[-1]
    rows = node.meta["val"].numel() // max(1, width)
    own = views_of(node)
    readers = [
        user for view in own for user in view.users
        if user not in own and (is_backward(user) or user.op == "output")
    ]  # fmt: skip
    return bool(readers) and all(_sums(reader, own, rows, width) for reader in readers)


def views_of(node: fx.Node) -> set[fx.Node]:
    """A value and its views."""
    found, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user.target in _VIEWS and user not in found:
                found.add(user)
                stack.append(user)
    return found


def _sums(reader: fx.Node, own: set[fx.Node], rows: int, width: int) -> bool:
    if reader.target is not aten.mm.default:
        return False
    left, right = reader.args[:2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if (left in own) == (right in own):
        return False
    if right in own:
        return shape_of(right.meta["val"]) == (rows, width)
    return shape_of(left.meta["val"]) == (width, rows)
