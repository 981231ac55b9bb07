"""Weight formats: what the weight of a layer may become, and the operator that computes with it.

One file per family; a family is found by lying in this folder. ``find_format("int4-g32")`` gives a
format by name, ``list_formats()`` the names the families offer.
"""

from __future__ import annotations

from mopt.formats.base import Encoded, Format, GridFormat, find_format, list_formats
from mopt.formats.grid import Grid

__all__ = ["Encoded", "Format", "Grid", "GridFormat", "find_format", "list_formats"]
