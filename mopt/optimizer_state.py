"""Bytes of an optimizer's state, before its first step too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Bytes of each value in two quantized states, their scales included, and the block they share.
_LOW_BIT = {"8bit": (2 + 8 / 256, 256), "4bit": (1 + 8 / 128, 128), "Fp8": (2 + 8 / 256, 256)}
# Below this many values torchao keeps float states.
_LEAST_LOW_BIT = 4096
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
        _bytes(t) for t in pytree.tree_leaves(dict(optimizer.state)) if isinstance(t, Tensor)
    )
    if held:
        return held
    name = type(optimizer).__name__
    low_bit = next((v for k, v in _LOW_BIT.items() if name.endswith(k)), None)
    total = 0
    for group in optimizer.param_groups:
        copies = _COPIES.get(name, 2)
        if name == "SGD":
            copies = 1 if group["momentum"] else 0
        copies += bool(group.get("amsgrad"))
        if low_bit is not None:
            total += sum(_low_bit_bytes(p, *low_bit) for p in group["params"])
            continue
        total += sum(copies * p.numel() * p.element_size() for p in group["params"])
    return total


def _bytes(tensor: Tensor) -> int:
    """The memory of a tensor, or of the tensors that a subclass is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.untyped_storage().nbytes()
    names, _ = flatten()
    return sum(_bytes(getattr(tensor, name)) for name in names)


def _low_bit_bytes(p: Tensor, each: float, block: int) -> int:
    if p.numel() < _LEAST_LOW_BIT or p.numel() % block:
        return 2 * p.numel() * p.element_size()
    return int(p.numel() * each)
