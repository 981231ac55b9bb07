"""fold-norm-affine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample, outputs
from tests.tiny import Apply, RmsNorm, normal, sample

X = normal(2, 5, 8)


def of(forward: Callable[..., Any], **members: Any) -> Callable[[], Sample]:
    """A module that is built anew for every capture; ``members`` are the makers of its parts."""
    return lambda: sample(
        Apply(forward, **{name: make() for name, make in members.items()}), X, dynamic=True
    )


def linear(out: int = 6, *, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(8, out, bias=bias)


def layer_norm() -> nn.Module:
    return nn.LayerNorm(8)


def rms_norm() -> nn.Module:
    return nn.RMSNorm(8)


def through_moves(m: Apply, x: Tensor) -> Tensor:
    y = m.norm(x)
    first = m.a(y[:, 0])
    rest = m.b(y.reshape(-1, 8)).view(-1, 5, 6)
    return m.c(y.transpose(0, 1)).transpose(0, 1) + rest + first.unsqueeze(1)


def tied(m: Apply, x: Tensor) -> Tensor:
    """A head whose weight is used a second time."""
    return m.head(m.norm(x)) + m.head.weight.sum()


def bfloat16_rms() -> Sample:
    module = nn.Sequential(RmsNorm(8), nn.Linear(8, 6, bias=False))
    found = sample(module, X, dynamic=True)
    return Sample(found.module.bfloat16(), (X.bfloat16(),), found.dynamic_shapes)


def float_gamma_on_bfloat16() -> Sample:
    """Gamma in float32 makes the product float32: leaving it out would change the dtype."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        y = x.float()
        y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
        return m.linear(m.gamma * y)

    members = {"linear": nn.Linear(8, 6), "gamma": torch.rand(8)}
    return Sample(Apply(forward, **members), (X.bfloat16(),))


def mean_over_another_axis(m: Apply, x: Tensor) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)
    return m.a(m.gamma * y)


def gamma() -> Tensor:
    return torch.rand(8)


CASES = [
    Case("layer-norm", of(lambda m, x: m.a(m.norm(x)), norm=layer_norm, a=linear()), changed=True),
    Case(
        "layer-norm-to-linears-without-bias",
        of(
            lambda m, x: m.a(m.norm(x)) * m.norm.bias.sum() + m.b(m.norm(x)),
            norm=layer_norm,
            a=linear(bias=False),
            b=linear(),
        ),
        changed=True,
    ),
    Case(
        "one-norm-three-linears",
        of(
            lambda m, x: (lambda y: m.a(y) + m.b(y) * m.c(y))(m.norm(x)),
            norm=layer_norm,
            a=linear(),
            b=linear(bias=False),
            c=linear(),
        ),
        changed=True,
    ),
    Case(
        "without-beta",
        of(
            lambda m, x: m.a(m.norm(x)),
            norm=lambda: nn.LayerNorm(8, bias=False),
            a=linear(bias=False),
        ),
        changed=True,
    ),
    Case(
        "rms-norm-operator",
        of(lambda m, x: m.a(m.norm(x)), norm=rms_norm, a=linear()),
        changed=True,
    ),
    Case(
        "through-moves",
        of(through_moves, norm=layer_norm, a=linear(), b=linear(), c=linear()),
        changed=True,
    ),
    Case(
        "llama-blocks-but-not-the-tied-head",
        tiny.decoder,
        changed=True,
        skipped="'head.weight' is shared",
    ),
    Case("bfloat16", bfloat16_rms, changed=True),
    # ---- what must stay
    Case("no-norm", tiny.mlp, changed=False),
    Case(
        "nothing-to-fold",
        of(
            lambda m, x: m.a(m.norm(x)),
            norm=lambda: nn.LayerNorm(8, elementwise_affine=False),
            a=linear(),
        ),
        changed=False,
    ),
    Case(
        "residual-after-norm",
        of(lambda m, x: (lambda y: y + m.a(y))(m.norm(x)), norm=layer_norm, a=linear(8)),
        changed=False,
        skipped="aten.add.Tensor, which is not a linear layer",
    ),
    Case(
        "norm-is-an-output",
        of(lambda m, x: (lambda y: (y, m.a(y)))(m.norm(x)), norm=layer_norm, a=linear()),
        changed=False,
        skipped="output of the model",
    ),
    Case(
        "last-axis-moves",
        of(lambda m, x: m.a(m.norm(x).transpose(1, 2)), norm=layer_norm, a=lambda: nn.Linear(5, 6)),
        changed=False,
        skipped="transpose",
    ),
    Case(
        "last-axis-is-cut",
        of(lambda m, x: m.a(m.norm(x).reshape(-1, 4)), norm=layer_norm, a=lambda: nn.Linear(4, 6)),
        changed=False,
        skipped="reshape",
    ),
    Case("tied-weight", of(tied, norm=layer_norm, head=linear()), changed=False, skipped="shared"),
    Case(
        "norm-over-two-axes",
        of(lambda m, x: m.a(m.norm(x)), norm=lambda: nn.LayerNorm((5, 8)), a=linear()),
        changed=False,
        skipped="2 axes",
    ),
    Case(
        "norm-becomes-a-weight",
        of(lambda m, x: torch.nn.functional.linear(x, m.norm(x[0])), norm=layer_norm),
        changed=False,
        skipped="not a linear layer",
    ),
    Case("gamma-decides-the-dtype", float_gamma_on_bfloat16, changed=False),
    Case(
        "scale-without-norm",
        of(lambda m, x: m.a(m.gamma * x), gamma=gamma, a=linear()),
        changed=False,
    ),
    Case(
        "mean-over-another-axis", of(mean_over_another_axis, gamma=gamma, a=linear()), changed=False
    ),
    Case(
        "excluded",
        of(lambda m, x: m.a(m.norm(x)), norm=layer_norm, a=linear()),
        options={"skip": "norm"},
        changed=False,
    ),
]


def test_a_linear_layer_gets_a_bias_only_if_beta_is_not_zero() -> None:
    found = of(lambda m, x: m.a(m.norm(x)), norm=layer_norm, a=linear(bias=False))()
    fold = Pipeline([make_pass("fold-norm-affine", {})])
    assert sorted(fold.run(found.capture()).weights()) == ["a.bias_norm", "a.weight_norm"]
    nn.init.zeros_(found.module.norm.bias)
    assert sorted(fold.run(found.capture()).weights()) == ["a.weight_norm"]


def test_after_folding_a_rotation_commutes_with_the_norm() -> None:
    """What the pass is for: RMS norm without gamma commutes with an orthogonal matrix."""
    found = of(lambda m, x: m.a(m.norm(x)), norm=rms_norm, a=linear(bias=False))()
    result = Pipeline([make_pass("fold-norm-affine", {})]).run(found.capture())
    rotation = torch.linalg.qr(normal(8, 8, seed=3))[0]
    (weight,) = result.weights().values()
    rotated = torch.nn.functional.rms_norm(X @ rotation, (8,)) @ (weight @ rotation).t()
    torch.testing.assert_close(rotated, outputs(result, (X,), {})[0], rtol=0, atol=2e-6)
