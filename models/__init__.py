"""A zoo of real architectures in plain PyTorch: `names()` lists them, `load(name)` gives one.

Neither this import nor `names()` imports torch.
"""

from __future__ import annotations

from mopt.models._listing import Listing, load, names

__all__ = ["Listing", "load", "names"]
