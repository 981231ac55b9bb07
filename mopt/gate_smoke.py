"""A model made small for a quick check: two of each run of equal blocks, the rest as it is."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mopt.model_source import ModelSource

_KEPT = 2


def shrunk(source: ModelSource) -> tuple[ModelSource, str]:
    """The source with a shallower copy of its model, and a word about what was done.

    Every ``nn.ModuleList`` and ``nn.Sequential`` of more than two blocks of one class keeps its
    first two. A model that does not run like that is left whole: depth may be part of its meaning.
    """
    model = copy.deepcopy(source.model)
    dropped = _drop_blocks(model)
    if not dropped:
        return source, "whole: no repeated blocks"
    if not _runs(model, source.example_inputs):
        return source, "whole: it does not run with fewer blocks"
    return replace(source, model=model), f"{dropped} repeated blocks left out"


def _drop_blocks(model: nn.Module) -> int:
    dropped = 0
    for name, child in list(model.named_children()):
        alike = len({type(block) for block in child.children()}) == 1
        if isinstance(child, nn.ModuleList | nn.Sequential) and alike and len(child) > _KEPT:
            dropped += len(child) - _KEPT
            setattr(model, name, child[:_KEPT])
        dropped += _drop_blocks(getattr(model, name))
    return dropped


def _runs(model: nn.Module, inputs: Any) -> bool:
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        return False
    finally:
        model.train(was_training)
    return True
