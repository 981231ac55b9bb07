"""use-linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mopt.layers import find_layers
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.tiny import Apply, normal, sample

ROWS = normal(5, 8)


def of(
    forward: Callable[..., Any], x: Tensor = ROWS, **members: tuple[int, ...]
) -> Callable[[], Sample]:
    """A module with parameters of the given shapes."""
    return lambda: sample(
        Apply(forward, **{n: nn.Parameter(torch.ones(s)) for n, s in members.items()}),
        x,
        dynamic=True,
    )


def tied(m: Apply, x: Tensor) -> Tensor:
    """A matrix that is used forwards and backwards."""
    return (x @ m.w) @ m.w.t()


CASES = [
    Case("addmm", of(lambda m, x: torch.addmm(m.b, x, m.w), w=(8, 6), b=(6,)), changed=True),
    Case("mm", of(lambda m, x: torch.mm(x, m.w), w=(8, 6)), changed=True),
    Case("matmul", of(lambda m, x: x @ m.w, normal(2, 5, 8), w=(8, 6)), changed=True),
    Case("linear-already", tiny.linear, changed=False),
    Case("two-values", of(lambda m, x: x @ x.t(), normal(4, 4)), changed=False),
    Case("matrix-on-the-left", of(lambda m, x: m.w @ x.t(), w=(6, 8)), changed=False),
    Case("vector", of(lambda m, x: x @ m.w, w=(8,)), changed=False),
    Case("stack", of(lambda m, x: x.unsqueeze(1) @ m.w, w=(1, 8, 6)), changed=False),
    Case("tied", of(tied, w=(8, 6)), changed=False, skipped="stored twice"),
    Case(
        "scaled-bias",
        of(lambda m, x: torch.addmm(m.b, x, m.w, beta=2), w=(8, 6), b=(6,)),
        changed=False,
        skipped="scaled",
    ),
    Case(
        "bias-per-row",
        of(lambda m, x: torch.addmm(x[:, :6], x, m.w), w=(8, 6)),
        changed=False,
        skipped="one element per column",
    ),
    Case(
        "bias-of-one-element",
        of(lambda m, x: torch.addmm(m.b, x, m.w), w=(8, 6), b=(1,)),
        changed=False,
        skipped="one element per column",
    ),
    Case("excluded", of(lambda m, x: x @ m.w, w=(8, 6)), options={"skip": "*"}, changed=False),
]


def test_the_product_becomes_a_layer_of_the_same_size() -> None:
    program = of(lambda m, x: torch.addmm(m.b, x, m.w), w=(8, 6), b=(6,))().capture()
    assert find_layers(program) == []
    result = Pipeline([make_pass("use-linear", {})]).run(program)
    (layer,) = find_layers(result)
    assert layer.shape == (6, 8)
    assert result.weight(layer.weight).is_contiguous()
    assert result.size_bytes() == program.size_bytes()
    assert result.flops() == program.flops()
