"""Second moments of the channels of a value over calibration batches."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows are taken in pieces, so that the copy of a large activation stays small.
_PIECE = 1 << 16


class ChannelMoments:
    """Mean and second moment of the channels along ``axis``, over all other axes and batches.

    Of a batch with more than ``most_rows`` rows that many are taken, evenly spread: neighbouring
    places of an image tell the same.
    """

    def __init__(self, axis: int = -1, most_rows: int | None = None) -> None:
        self.axis = axis
        self.most_rows = most_rows
        self.rows = 0
        self._sum = torch.zeros(0, dtype=torch.float64)
        self._products = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, value: Tensor) -> bool:
        """Take in a batch."""
        rows = value.detach().movedim(self.axis, -1).flatten(0, -2)
        if self.most_rows is not None and len(rows) > self.most_rows:
            rows = rows[:: -(-len(rows) // self.most_rows)]
        if not bool(torch.isfinite(rows).all()):
            return False
        if self.rows == 0:
            width = rows.shape[1]
            self._sum = torch.zeros(width, dtype=torch.float64, device=rows.device)
            self._products = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
        for piece in rows.split(_PIECE):
            part = piece.float()
            self._products += part.t() @ part
            self._sum += part.sum(0, dtype=torch.float64)
        self.rows += len(rows)
        return True

    @property
    def second(self) -> Tensor:
        """The mean of x x^T over rows x, (C, C) float64."""
        return self._products / max(self.rows, 1)

    @property
    def mean(self) -> Tensor:
        """The mean of the rows, (C,) float64."""
        return self._sum / max(self.rows, 1)
