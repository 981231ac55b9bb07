"""Finds the rewrites of this folder and runs them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common_passes


@dataclass(frozen=True)
class Rewrite:
    """One rewrite: its file's name, when it runs, and the function that changes a model."""

    name: str
    order: int
    run: Callable[[ir.Model], int]


@cache
def all_rewrites() -> tuple[Rewrite, ...]:
    """Every rewrite of the folder, in the order they run."""
    package = __name__.rpartition(".")[0]
    found = []
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.name.startswith("_"):
            loaded = importlib.import_module(f"{package}.{module.name}")
            found.append(Rewrite(module.name, loaded.ORDER, loaded.rewrite))
    return tuple(sorted(found, key=lambda r: (r.order, r.name)))


def apply_rewrites(model: ir.Model, *, skip: frozenset[str] = frozenset()) -> dict[str, int]:
    """Run every rewrite but those named in ``skip``; the number of places each one changed."""
    counts = {}
    for rewrite in all_rewrites():
        if rewrite.name not in skip:
            counts[rewrite.name] = rewrite.run(model)
            if counts[rewrite.name]:
                common_passes.RemoveUnusedNodesPass()(model)
    return counts
