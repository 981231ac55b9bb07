"""Which single weights stay: patterns, and scores by which they are chosen."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from mopt.errors import UsageError, quote

_PATTERN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Pattern:
    """Which weights may be zero: any ``ratio`` of them, or all but ``keep`` of each ``group``.

    Groups are consecutive inputs of one output, as kernels read them.
    """

    ratio: float
    keep: int = 0
    group: int = 0

    @staticmethod
    def parse(owner: str, text: str, ratio: float) -> Pattern:
        """ "unstructured" or "n:m". Raises UsageError."""
        if text == "unstructured":
            return Pattern(ratio)
        found = _PATTERN.fullmatch(text)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise UsageError(
                f"{owner}: option pattern is {quote(text)}, expected 'unstructured' or 'n:m' with "
                "0 < n < m",
                code="bad-option",
                hint="pattern='2:4' keeps two of every four weights",
            )
        keep, group = int(found[1]), int(found[2])
        return Pattern(1 - keep / group, keep, group)

    def misfit(self, width: int) -> str | None:
        """Why rows of that width cannot have the pattern, or None."""
        if self.group and width % self.group:
            return f"its {width} inputs are not a multiple of {self.group}"
        return None

    def kept(self, scores: Tensor, *, per_row: bool) -> Tensor:
        """Where weights stay: those with the largest scores (rows, columns); ties go leftmost.

        Unstructured, the same number goes in every row with ``per_row``, else over the matrix.
        """
        if self.group:
            groups = scores.unflatten(1, (-1, self.group))
            order = groups.argsort(dim=2, descending=True, stable=True)
            mask = torch.zeros_like(groups, dtype=torch.bool)
            mask.scatter_(2, order[:, :, : self.keep], True)
            return mask.flatten(1)
        flat = scores if per_row else scores.reshape(1, -1)
        count = flat.shape[1] - round(flat.shape[1] * self.ratio)
        order = flat.argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask.scatter_(1, order[:, :count], True)
        return mask.reshape(scores.shape)


def size_only(backend: str) -> str:
    """What a user should know before weights are set to zero."""
    return (
        f"single zeros make nothing faster on the {backend} backend, which computes with them: "
        "the model is stored as it was, with zeros in it (size only, once compressed)"
    )
