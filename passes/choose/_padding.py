"""Outputs at padded positions, which nobody reads: they are no part of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mopt.program import Program

_NAME = "attention_mask"


def padding_mask(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Which positions of a batch are real (batch, length), bool; None where nothing is padded.

    Read from the input that models of sequences call ``attention_mask``, 1 for real positions.
    """
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    for name, value in zip(names, program.flat_inputs(args, kwargs), strict=False):
        if not name.endswith(_NAME) or not isinstance(value, Tensor) or value.dim() != 2:
            continue
        if value.is_floating_point() or not torch.equal(value, value.bool().to(value.dtype)):
            return None
        real = value.bool()
        return real if real.any() and not real.all() else None
    return None


def real_rows(outputs: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """The outputs; of those with a row for every position, the rows of real ones (rows, width)."""
    if mask is None:
        return list(outputs)
    return [out[mask] if out.dim() > 2 and out.shape[:2] == mask.shape else out for out in outputs]
