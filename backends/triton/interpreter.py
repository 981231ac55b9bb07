"""Runs launches on the CPU with Triton's interpreter, in this process and without a trace in it.

Triton decides at import whether functions are compiled or interpreted, from an environment
variable for the whole process. Here interpreted twins of the same functions are made beside the
compiled ones, and what the interpreter replaces in ``triton.language`` is put back after each run.

The interpreter computes with bfloat16 wrongly (bit patterns are added as integers) and rounds to
it by cutting off, so such tensors are widened to float32 before a run and rounded by torch after
it. Kernels must not make 8-bit floats by a cast when ``ARCH`` is 0.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from mopt.backends.triton.launch import Launch

ARCH = 0
# Triton's interpreter knows these reductions by identity and computes them by numpy.
_BY_IDENTITY = ("_combine", "_elementwise")
_lock = threading.RLock()


def run_interpreted(launch: Launch) -> None:
    """Compute a launch on CPU tensors. One at a time: others wait."""
    arguments = dict(launch.arguments)
    # An unused argument may be another's tensor, so twins go by tensor.
    widened: dict[int, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            if id(value) not in widened:
                widened[id(value)] = _widened(value)
            arguments[name] = widened[id(value)]
    constants = {
        name: tl.float32 if value is tl.bfloat16 else value
        for name, value in launch.constants.items()
    }
    twin = interpreted(launch.function)
    with _lock, _language_restored():
        twin[launch.grid](**arguments, **constants, ARCH=ARCH)
    for name in launch.outputs:
        original = launch.arguments[name]
        if id(original) in widened:
            original.copy_(widened[id(original)])


def _widened(value: Tensor) -> Tensor:
    """The values in fp32 with the strides they have, which the launch states, also of a view."""
    if not value.numel():
        return value.float()
    reach = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    flat = value.as_strided((reach,), (1,)).float()
    return flat.as_strided(value.shape, value.stride())


_globals: dict[int, dict[str, Any]] = {}


@cache
def interpreted(function: JITFunction) -> InterpretedFunction:
    """The interpreted twin of a compiled function; those it calls become twins too."""
    return InterpretedFunction(_clone(function.fn))


def _clone(fn: types.FunctionType) -> types.FunctionType:
    copied = types.FunctionType(
        fn.__code__, _twin_globals(fn.__globals__), fn.__name__, fn.__defaults__, fn.__closure__
    )
    copied.__kwdefaults__ = fn.__kwdefaults__
    copied.__annotations__ = dict(fn.__annotations__)
    copied.__module__ = fn.__module__
    copied.__qualname__ = fn.__qualname__
    return copied


def _twin_globals(original: dict[str, Any]) -> dict[str, Any]:
    known = _globals.get(id(original))
    if known is None:
        known = _globals[id(original)] = dict(original)
        for name, value in original.items():
            if isinstance(value, JITFunction) and not _is_known_by_identity(name):
                known[name] = InterpretedFunction(_clone(value.fn))
    return known


def _is_known_by_identity(name: str) -> bool:
    return any(part in name for part in _BY_IDENTITY)


@contextmanager
def _language_restored() -> Iterator[None]:
    """Interpreted twins of Triton's own library during a run; afterwards everything as before."""
    modules = (tl, tl.core, tl.math, tl.standard)
    classes = (tl.core.tensor, tl.core.dtype, tl.core.condition, tl.core.tensor_descriptor_base)
    before = [(owner, dict(vars(owner))) for owner in (*modules, *classes)]
    for name, value in vars(tl).copy().items():
        if isinstance(value, JITFunction) and not _is_known_by_identity(name):
            setattr(tl, name, interpreted(value))
    try:
        yield
    finally:
        for owner, values in before:
            for name in set(vars(owner)) - set(values):
                delattr(owner, name)
            for name, value in values.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)
