"""Optimizers that keep less state than AdamW; they are used like those of ``torch.optim``.

``LowRankAdamW`` keeps the moments of a projection of each gradient: GaLore (Zhao et al., ICML
2024), with the options of Q-GaLore (projection in 4 bits, fewer and fewer new projections) and of
the DCT variant (columns of one fixed basis). ``FloatEightAdamW`` keeps both moments in fp8 whose
range is expanded group by group (COAT, ICLR 2025, section 4). Both change the update: they
approximate AdamW and are no part of an exact plan. ``state_bytes`` tells what they will hold.
``low_bit_adamw`` (torchao's) and ``MuonAdamW`` (torch's) are here under one roof.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mopt.errors import InputError
from mopt.optim_more import MuonAdamW, low_bit_adamw
from mopt.saved_codecs import restore, squeeze, squeezed_bytes

__all__ = ["FloatEightAdamW", "LowRankAdamW", "MuonAdamW", "low_bit_adamw"]

PROJECTIONS = ("svd", "dct")
GROUP = 128
_FP8_TOP = 448.0
# Below this ratio of the largest to the least magnitude there is nothing to expand.
_NARROW = 1 + 1e-3
_MOST_POWER = 16.0
_ALIKE, _HISTORY = 0.4, 5


class _AdamW(torch.optim.Optimizer, ABC):
    """The loop over parameters and AdamW's update; subclasses keep the state."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        betas = defaults["betas"]
        if defaults["lr"] < 0 or not all(0 <= b < 1 for b in betas) or defaults["eps"] < 0:
            raise InputError(
                f"lr {defaults['lr']}, betas {betas} or eps {defaults['eps']} is out of range",
                code="optimizer-option",
                hint="lr and eps from 0, betas from 0 to below 1",
            )
        super().__init__(params, defaults)
        self._numbers: dict[Tensor, int] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; returns the closure's result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                number = self._numbers.setdefault(p, len(self._numbers) + 1)
                if p.grad is not None:
                    # Decay first: the new step is not decayed.
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(self._change(p, p.grad, group, number), alpha=-group["lr"])
        return loss

    @abstractmethod
    def _change(self, p: Tensor, grad: Tensor, group: dict[str, Any], number: int) -> Tensor:
        """The direction of a step for one parameter, the ``number``-th; moves the state."""


def _moments(
    first: Tensor, second: Tensor, grad: Tensor, group: dict[str, Any], step: int
) -> Tensor:
    """Move both moments in place; Adam's direction, bias corrected."""
    one, two = group["betas"]
    first.lerp_(grad, 1 - one)
    second.mul_(two).addcmul_(grad, grad, value=1 - two)
    low = second.sqrt().div_(math.sqrt(1 - two**step)).add_(group["eps"])
    return first / low / (1 - one**step)


class LowRankAdamW(_AdamW):
    """AdamW on projected gradients of matrices: GaLore and its relatives.

    ``rank`` is the width of the projection; a matrix whose smaller side is not above it, and what
    has other than two dimensions, gets plain AdamW. ``every`` steps the projection is found anew,
    matrix by matrix in turn. ``scale`` multiplies the projected step. ``projection``: ``svd`` of
    the gradient, or ``dct``: the columns of one cosine basis that hold most of it, whose moments
    stay with their columns. ``quantized`` keeps the projection in 4 bits and doubles ``every`` for
    a matrix whose main direction stays (Q-GaLore; ``svd`` only). Published defaults: rank 128,
    every 200, scale 0.25.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        rank: int = 128,
        every: int = 200,
        scale: float = 0.25,
        projection: str = "svd",
        quantized: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if projection not in PROJECTIONS or rank < 1 or every < 1:
            raise InputError(
                f"projection {projection!r}, rank {rank} or every {every} is not possible",
                code="optimizer-option",
                hint=f"projection is one of {', '.join(PROJECTIONS)}; rank and every from 1",
            )
        if quantized and projection != "svd":
            raise InputError("only an svd projection is quantized", code="optimizer-option")
        super().__init__(params, {
            "lr": lr, "rank": rank, "every": every, "scale": scale, "projection": projection,
            "quantized": quantized, "betas": betas, "eps": eps, "weight_decay": weight_decay,
        })  # fmt: skip
        self._bases: dict[tuple[int, torch.device], Tensor] = {}

    def state_bytes(self) -> int:
        """Bytes of all state after the first step, the cosine bases included."""
        total = 0
        bases = set()
        for group in self.param_groups:
            for p in group["params"]:
                rank = _rank(p, group)
                if not rank:
                    total += 8 * p.numel()
                    continue
                total += 8 * rank * max(p.shape)
                if group["projection"] == "dct":
                    total += 8 * rank
                    bases.add(min(p.shape))
                else:
                    count = rank * min(p.shape)
                    total += squeezed_bytes("int4", count) if group["quantized"] else 4 * count
        return total + sum(4 * n * n for n in bases)

    def _change(self, p: Tensor, grad: Tensor, group: dict[str, Any], number: int) -> Tensor:
        state = self.state[p]
        rank = _rank(p, group)
        grad = grad.float()
        # The projection acts on the smaller side, from the right.
        turned = bool(rank) and grad.shape[0] < grad.shape[1]
        if turned:
            grad = grad.mT
        step = state["step"] = state.get("step", 0) + 1
        if not rank:
            low, basis = grad, None
        elif group["projection"] == "dct":
            low, basis = self._columns(state, grad, group, rank, step, number)
        else:
            basis = self._directions(state, grad, group, rank, step, number)
            low = grad @ basis
        if "first" not in state:
            state["first"], state["second"] = torch.zeros_like(low), torch.zeros_like(low)
        change = _moments(state["first"], state["second"], low, group, step)
        if basis is None:
            return change.to(p.dtype)
        change = (change @ basis.mT).mul_(group["scale"])
        return (change.mT if turned else change).to(p.dtype)

    def _directions(
        self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], rank: int, step: int,
        number: int,
    ) -> Tensor:  # fmt: skip
        """The right singular vectors of a gradient, [n, rank], found anew when it is time."""
        every = state.setdefault("every", group["every"])
        # Matrices take turns, so that one step does not find all projections.
        if step == 1 or step >= state["next"]:
            found = _leading(grad, rank)
            if step == 1:
                state["next"] = step + every * (1 + number % 8) // 8 + 1
            else:
                if group["quantized"]:
                    _slow_down(state, found)
                state["next"] = step + state["every"]
            if found is not None or step == 1:
                basis = torch.eye(grad.shape[1], rank) if found is None else found
                basis = basis.to(grad.device)
                state["basis"] = squeeze(basis, "int4") if group["quantized"] else basis
                state["main"] = basis[:, 0].clone()
        kept: Tensor = state["basis"]
        if group["quantized"]:
            return restore(kept, "int4", [grad.shape[1], rank], torch.float32)
        return kept

    def _columns(
        self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], rank: int, step: int,
        number: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The chosen columns of the gradient in the cosine basis, and these basis columns."""
        basis = self._basis(grad.shape[1], grad.device)
        whole = grad @ basis
        if step == 1 or (step + number) % group["every"] == 0:
            chosen = whole.square().sum(0).topk(rank).indices.sort().values
            before = state.get("columns")
            if before is not None:
                # Moments follow their columns; a new column begins with none.
                same = chosen[:, None] == before[None, :]
                for name in ("first", "second"):
                    state[name] = state[name] @ same.to(grad.dtype).mT
            state["columns"] = chosen
        chosen = state["columns"]
        return whole[:, chosen], basis[:, chosen]

    def _basis(self, n: int, device: torch.device) -> Tensor:
        if (n, device) not in self._bases:
            places = torch.arange(n, dtype=torch.float64)
            rows = torch.cos(math.pi * places[:, None] * (2 * places[None, :] + 1) / (2 * n))
            rows *= math.sqrt(2 / n)
            rows[0] *= math.sqrt(0.5)
            self._bases[n, device] = rows.mT.float().to(device)
        return self._bases[n, device]


def _rank(p: Tensor, group: dict[str, Any]) -> int:
    """The rank that a parameter is projected to, 0: it is not."""
    return group["rank"] if p.dim() == 2 and min(p.shape) > group["rank"] else 0


def _leading(grad: Tensor, rank: int) -> Tensor | None:
    """The first right singular vectors [n, rank]; None where the gradient has none."""
    if not bool(grad.any()) or not bool(grad.isfinite().all()):
        return None
    found: Tensor = torch.linalg.svd(grad, full_matrices=False).Vh
    return found[:rank].mT.contiguous()


def _slow_down(state: dict[str, Any], found: Tensor | None) -> None:
    """Double the steps between projections where the main direction stays (Q-GaLore)."""
    if found is None:
        return
    alike = abs(float(found[:, 0] @ state["main"]))
    history = [*state.get("alike", []), alike][-_HISTORY:]
    state["alike"] = history
    if len(history) == _HISTORY and sum(history) / _HISTORY >= _ALIKE:
        state["every"] *= 2
        state["alike"] = []


class FloatEightAdamW(_AdamW):
    """AdamW whose moments lie in E4M3 with an expanded range: 2.19 bytes a parameter, not 8.

    Each group of 128 values is raised to a power that stretches its range over that of the format.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def state_bytes(self) -> int:
        """Bytes of both moments after the first step."""
        return sum(
            2 * -(-p.numel() // GROUP) * (GROUP + 12)
            for group in self.param_groups for p in group["params"]
        )  # fmt: skip

    def _change(self, p: Tensor, grad: Tensor, group: dict[str, Any], number: int) -> Tensor:
        state = self.state[p]
        step = state["step"] = state.get("step", 0) + 1
        if step == 1:
            first, second = (torch.zeros_like(grad, dtype=torch.float32) for _ in range(2))
        else:
            (one, about_one), (two, about_two) = state["first"], state["second"]
            first = expanded(one, about_one, p.shape)
            second = expanded(two, about_two, p.shape)
        change = _moments(first, second, grad.float(), group, step)
        state["first"], state["second"] = compact(first), compact(second)
        return change.to(p.dtype)


def compact(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 codes [groups, 128] and their scale, power and centre [groups, 3] (COAT, eq. 4-6)."""
    flat = values.flatten().float()
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
    size = rows.abs()
    most = size.amax(1, keepdim=True)
    least = torch.where(size > 0, size, torch.inf).amin(1, keepdim=True)
    empty = most == 0
    most, least = torch.where(empty, 1.0, most), torch.where(empty, 1.0, least)
    centre = most.sqrt() * least.sqrt()
    ratio = most / least
    power = (16 * math.log2(_FP8_TOP**2 / 2) / ratio.clamp_min(_NARROW).log2()).floor_() / 16
    # A very wide group is pressed together rather than cut off at its small end.
    power = power.clamp_(1 / 16, _MOST_POWER)
    power = torch.where(ratio < _NARROW, 1.0, power)
    scale = (most / centre).pow(power) / _FP8_TOP
    raised = (size / centre).pow(power) / scale * rows.sign()
    codes = raised.clamp_(-_FP8_TOP, _FP8_TOP).to(torch.float8_e4m3fn)
    return codes, torch.cat((scale, power, centre), dim=1)


def expanded(codes: Tensor, numbers: Tensor, shape: Iterable[int]) -> Tensor:
    """The values that :func:`compact` was given, within the format's steps."""
    scale, power, centre = numbers.split(1, dim=1)
    raised = codes.float() * scale
    rows = raised.sign() * raised.abs().pow(1 / power) * centre
    sizes = list(shape)
    return rows.flatten()[: math.prod(sizes)].view(sizes)
