"""Zeros whose errors the other weights make up for (SparseGPT).

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can be Accurately Pruned in
One-Shot", algorithm 1, with U for the factor of the inverse Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopt.passes.prune._masks import Pattern
from mopt.second_order import inverse_factor

_BLOCK = 128


@dataclass(frozen=True)
class Compensated:
    """A sparse weight. ``loss`` is the squared error of the output per row of inputs, with the
    damping that was added (a share of the mean of the moment's diagonal); None where no damping
    helped and nothing was made up for."""

    weight: Tensor
    damping: float | None
    loss: float


def prune_compensated(
    weight: Tensor, moment: Tensor, pattern: Pattern, *, damping: float = 0.01
) -> Compensated:
    """Zeros of a pattern in a weight (N, K) for inputs with a second ``moment`` (K, K).

    Weights of inputs that were always zero go first. Columns are visited from left to right; what
    a zero costs is spread over the columns still to come.
    """
    h = moment.double().clone()
    dead = h.diagonal() <= 0
    h[dead] = 0
    h[:, dead] = 0
    h.diagonal()[dead] = 1
    w = weight.double().clone()
    w[:, dead] = 0
    scale = float(h.diagonal()[~dead].mean()) if not bool(dead.all()) else 1.0
    factor, used = inverse_factor(h, torch.arange(len(h)), damping, scale)
    if factor is None:
        mask = pattern.kept(w.abs() * h.diagonal().sqrt(), per_row=True)
        return Compensated((w * mask).to(weight.dtype), None, 0.0)
    columns = w.shape[1]
    block = _BLOCK if not pattern.group else max(_BLOCK // pattern.group, 1) * pattern.group
    loss = 0.0
    whole = pattern.kept(w.square() / factor.diagonal().square(), per_row=False)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        u = factor[start:stop, start:stop]
        part, errors = w[:, start:stop], torch.zeros_like(w[:, start:stop])
        step = pattern.group or stop - start
        # Where any weight may go, blocks lose as many as they would in one choice over all.
        own_share = float((~whole[:, start:stop]).double().mean())
        here = pattern if pattern.group else Pattern(own_share)
        for first in range(0, stop - start, step):
            own = slice(first, first + step)
            # The mask of a group is chosen when its first column is reached, on weights that have
            # taken up the errors so far.
            scores = part[:, own].square() / u.diagonal()[own].square()
            mask = here.kept(scores, per_row=False)
            for at in range(first, first + step):
                column = part[:, at]
                kept = torch.where(mask[:, at - first], column, 0.0)
                error = (column - kept) / u[at, at]
                part[:, at + 1 :].addr_(error, u[at, at + 1 :], alpha=-1)
                part[:, at] = kept
                errors[:, at] = error
        w[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
        loss += float(errors.square().sum())
    return Compensated(w.to(weight.dtype), used, loss)
