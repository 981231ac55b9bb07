"""Masks of attention that are known when a model is compiled, as the numbers a kernel takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What models add to scores of keys that are not to be seen is at least as low as this: its
# exponential is 0 in every type.
_UNSEEN = -1e4


@dataclass(frozen=True)
class Band:
    """Query ``i`` sees keys up to ``i + offset`` where ``causal``, and of those ``window``."""

    causal: bool = False
    offset: int = 0
    window: int | None = None

    def seen(self, queries: int, keys: int) -> Tensor:
        """The mask for so many tokens, True where a key is seen."""
        position = torch.arange(queries)[:, None] + self.offset
        key = torch.arange(keys)[None]
        seen = key <= position if self.causal else torch.ones(queries, keys, dtype=torch.bool)
        return seen if self.window is None else seen & (key > position - self.window)


def band_of(mask: Tensor, queries: int, keys: int) -> Band | None:
    """The band that a stored mask is, by its values; None for any other mask.

    True where a key is seen, or what is added to a score: 0 or something very low.
    """
    if mask.dim() < 2 or tuple(mask.shape[-2:]) != (queries, keys) or not mask.numel():
        return None
    seen = mask
    if mask.dtype != torch.bool:
        seen = mask == 0
        if not bool((seen | (mask <= _UNSEEN)).all()):
            return None
    flat = seen.reshape(-1, queries, keys)
    rows = flat[0]
    if not bool((flat == rows).all()) or not bool(rows.any(1).all()):
        return None
    first = rows.int().argmax(1)
    last = keys - 1 - rows.flip(1).int().argmax(1)
    offset = int(last[0])
    begins = (first > 0).nonzero()
    window = None
    if len(begins):
        at = int(begins[0])
        window = at + offset + 1 - int(first[at])
    # Where the first query sees every key, the others may have come to the end before.
    causal = not bool((last == keys - 1).all())
    found = Band(causal, offset if causal else 0, window)
    return found if torch.equal(found.seen(queries, keys), rows) else None
