"""mopt: make a PyTorch model smaller and faster on a device, within a budget, and prove it.

Public names are loaded on first use: ``import mopt`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Artifact": "mopt.lowering",
    "Budget": "mopt.budget",
    "MoptError": "mopt.errors",
    "Pass": "mopt.pass_base",
    "PassContext": "mopt.pass_base",
    "Pipeline": "mopt.pipeline",
    "Program": "mopt.program",
    "Recipe": "mopt.recipe",
    "Report": "mopt.report",
    "capture": "mopt.frontend",
    "compile": "mopt.driver",
    "fit": "mopt.training_step",
    "load": "mopt.lowering",
    "lower": "mopt.lowering",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from mopt.budget import Budget as Budget
    from mopt.driver import compile as compile
    from mopt.errors import MoptError as MoptError
    from mopt.frontend import capture as capture
    from mopt.lowering import Artifact as Artifact
    from mopt.lowering import load as load
    from mopt.lowering import lower as lower
    from mopt.pass_base import Pass as Pass
    from mopt.pass_base import PassContext as PassContext
    from mopt.pipeline import Pipeline as Pipeline
    from mopt.program import Program as Program
    from mopt.recipe import Recipe as Recipe
    from mopt.report import Report as Report
    from mopt.training_step import fit as fit


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mopt' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
