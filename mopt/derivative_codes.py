"""Four bits for what backward of GELU and SiLU needs of their inputs: the derivative (S2A).

Backward only multiplies by the derivative, which is bounded; its code is one of 16 even steps
between the least and the largest derivative, rounded at random so that the expected derivative is
the derivative. What is restored is not the input but a stand-in with the code's derivative: the
derivative rises from one end to the other between its two extremes, so each step has its own input,
and the operators of backward run as they are.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx

from mopt.joint_tags import is_backward
from mopt.row_sampling import views_of

aten = torch.ops.aten
PREFIX = "derivative"
LEVELS = 16
_PIECE = 1 << 16
# Where the derivatives of these functions have their extremes, more or less.
_REACH = {"gelu-none": 1.4, "gelu-tanh": 1.4, "silu": 2.4}


def packed_bytes(_form: str, count: int) -> int:
    """Bytes of the codes of ``count`` values."""
    return -(-count // 2)


def form_for(node: fx.Node) -> str | None:
    """The form for a value that backward reads for one activation's derivative only, or None."""
    own = views_of(node)
    kinds = {
        _kind(user, own) for view in own for user in view.users
        if user not in own and (is_backward(user) or user.op == "output")
    }  # fmt: skip
    (kind,) = kinds if len(kinds) == 1 else (None,)
    return f"{PREFIX}-{kind}" if kind else None


def _kind(reader: fx.Node, own: set[fx.Node]) -> str | None:
    gradient, *rest = reader.args
    if gradient in own or not rest or rest[0] not in own:
        return None
    if reader.target is aten.gelu_backward.default:
        return f"gelu-{reader.kwargs.get('approximate', 'none')}"
    return "silu" if reader.target is aten.silu_backward.default else None


def derivative(value: Tensor, form: str) -> Tensor:
    """The derivative of the form's function at ``value``."""
    one = torch.ones_like(value)
    kind = form.removeprefix(f"{PREFIX}-")
    if kind == "silu":
        return aten.silu_backward(one, value)  # type: ignore[no-any-return]
    return aten.gelu_backward(one, value, approximate=kind.removeprefix("gelu-"))  # type: ignore[no-any-return]


@cache
def stand_ins(form: str) -> Tensor:
    """Inputs [16], float64, at which the derivative is each step of the grid, from least to most.

    The first and the last are the extremes, found by ternary search; the others by bisection.
    """
    reach = _REACH[form.removeprefix(f"{PREFIX}-")]
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    near, far = signs * 0.5 * reach, signs * 2 * reach
    for _ in range(100):
        one, two = near + (far - near) / 3, far - (far - near) / 3
        nearer = signs * derivative(one, form) > signs * derivative(two, form)
        near, far = torch.where(nearer, near, one), torch.where(nearer, two, far)
    least, most = derivative(near, form)
    wanted = torch.linspace(float(least), float(most), LEVELS, dtype=torch.float64)
    low, high = near[0].expand(LEVELS).clone(), near[1].expand(LEVELS).clone()
    for _ in range(60):
        middle = (low + high) / 2
        above = derivative(middle, form) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.cat((near[:1], low[1:-1], near[1:]))


def grid(form: str) -> tuple[float, float]:
    """The least derivative and the step between two codes."""
    ends = derivative(stand_ins(form)[[0, -1]], form)
    return float(ends[0]), float(ends[1] - ends[0]) / (LEVELS - 1)


def encode(value: Tensor, form: str) -> Tensor:
    """The codes of the derivatives at ``value``, two in a byte."""
    flat = value.reshape(-1)
    out = torch.zeros(packed_bytes(form, flat.numel()), dtype=torch.uint8, device=value.device)
    low, step = grid(form)
    generator = _generator(value.device)
    for start in range(0, flat.numel(), _PIECE):
        place = derivative(flat[start : start + _PIECE].float(), form).sub_(low).div_(step)
        drawn = torch.rand(place.shape, generator=generator, device=value.device)
        code = place.add_(drawn).floor_().clamp_(0, LEVELS - 1).to(torch.uint8)
        part = out[start // 2 : start // 2 + -(-code.numel() // 2)]
        part |= code[::2]
        part[: code.numel() // 2] |= code[1::2] << 4
    return out


def decode(packed: Tensor, form: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Stand-ins for the values: their derivatives are those of the codes."""
    table = stand_ins(form).to(packed.device, dtype)
    out = torch.empty(2 * packed.numel(), dtype=dtype, device=packed.device)
    for start in range(0, packed.numel(), _PIECE):
        part = packed[start : start + _PIECE]
        end = 2 * (start + part.numel())
        out[2 * start : end : 2] = table[(part & 15).int()]
        out[2 * start + 1 : end : 2] = table[(part >> 4).int()]
    count = 1
    for size in shape:
        count *= size
    return out[:count].view(shape)


@cache
def _generator(device: torch.device) -> torch.Generator:
    # One of its own: the model's random numbers are those of the plain step.
    return torch.Generator(device).manual_seed(0)
