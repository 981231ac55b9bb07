"""Bytes of an optimizer's state, before its first step too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Copies of a parameter that torch's optimizers keep; others are taken to keep two.
_COPIES = {"RMSprop": 1, "Adagrad": 1, "Muon": 1, "Adafactor": 1, "ASGD": 1, "Rprop": 2}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What lies in the optimizer's state, or will after its first step.

    An optimizer may tell itself, by a method ``state_bytes()``.
    """
    told = getattr(optimizer, "state_bytes", None)
    if told is not None:
        return int(told())
    held = sum(
        t.untyped_storage().nbytes()
        for t in pytree.tree_leaves(dict(optimizer.state)) if isinstance(t, Tensor)
    )  # fmt: skip
    if held:
        return held
    name = type(optimizer).__name__
    total = 0
    for group in optimizer.param_groups:
        copies = _COPIES.get(name, 2)
        if name == "SGD":
            copies = 1 if group["momentum"] else 0
        copies += bool(group.get("amsgrad"))
        total += sum(copies * p.numel() * p.element_size() for p in group["params"])
    return total
