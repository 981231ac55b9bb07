"""Mixture-of-experts decoder with two ways to run the experts on the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim

from mopt.models._blocks import Decoder, SwiGLU

VOCABULARY = 16_000
CONTEXT = 512
WIDTH = 256
EXPERTS, CHOSEN = 8, 2
CAPACITY_FACTOR = 2


class ExpertsBase(nn.Module):
    """Feed-forward layer whose tokens each go to the CHOSEN best of EXPERTS SwiGLU networks.

    The weights of the chosen experts are the softmax over their router scores.
    """

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(SwiGLU(WIDTH, 2 * WIDTH) for _ in range(EXPERTS))

    def shares(self, x: Tensor) -> Tensor:
        """x [N, WIDTH] -> share of each expert [N, EXPERTS], 0 where it was not chosen."""
        best, chosen = self.router(x).topk(CHOSEN, dim=-1)
        empty = x.new_zeros(x.shape[0], EXPERTS)
        return empty.scatter(-1, chosen, best.softmax(dim=-1))


class DenseExperts(ExpertsBase):
    """Every expert runs on every token and its share masks the result: exact, static shapes."""

    def forward(self, x: Tensor) -> Tensor:
        shares = self.shares(x.flatten(0, 1)).view(x.shape[0], x.shape[1], EXPERTS)
        total = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            total = total + shares[..., index, None] * expert(x)
        return total


class GatherExperts(ExpertsBase):
    """Every expert runs on the tokens with the largest shares, up to a fixed capacity.

    The capacity is CAPACITY_FACTOR times an even split; tokens of an expert beyond it are dropped,
    so the result equals `DenseExperts` while no expert is chosen by more tokens than that.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        shares = self.shares(rows)
        capacity = (rows.shape[0] * CHOSEN * CAPACITY_FACTOR + EXPERTS - 1) // EXPERTS
        total = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            share, row = shares[:, index].topk(capacity)
            total = total.index_add(0, row, share[:, None] * expert(rows[row]))
        return total.view_as(x)


def make(experts: type[ExpertsBase]) -> nn.Module:
    return Decoder(
        vocabulary=VOCABULARY,
        context=CONTEXT,
        width=WIDTH,
        layers=4,
        heads=8,
        kv_heads=4,
        feed_forward=experts,
    )


def draw() -> tuple[Tensor]:
    return (torch.randint(VOCABULARY, (2, 128)),)


def dynamic_shapes() -> dict[str, dict[int, object]]:
    return {"ids": {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=CONTEXT)}}
