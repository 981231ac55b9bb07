"""scale-awq, and the edges whose channels can be rescaled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.calibration import Calibration
from mopt.errors import PassError
from mopt.frontend import capture
from mopt.passes.quantize._scales import find_edges_to_scale, scale_edge
from mopt.passes.quantize.scale_awq import awq_factors
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case, Sample
from tests.passes.quantize.calibrated import batches_for, correlated, run_with
from tests.tiny import Apply, normal, sample


class Uneven(nn.Module):
    """Norm and two linear layers whose input channels differ a hundredfold in size."""

    def __init__(self, norm: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.norm = norm
        self.one = nn.Linear(width, 24)
        self.two = nn.Linear(width, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Both layers' results side by side."""
        y = self.norm(x)
        return torch.cat((self.one(y), self.two(y)), dim=-1)


def uneven(norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(32)) -> Sample:
    made = sample(Uneven(norm()), normal(64, 32), dynamic=True)
    weight = made.module.norm.weight
    with torch.no_grad():
        weight.copy_(torch.logspace(-1, 1, 32)[torch.randperm(32, generator=torch.Generator())])
    return made


def norm_is_returned() -> Sample:
    def forward(m: Apply, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.norm(x)
        return m.layer(y), y

    apply = Apply(forward, norm=nn.LayerNorm(32), layer=nn.Linear(32, 24))
    return sample(apply, normal(8, 32), dynamic=True)


def calibrated(
    name: str, source: Callable[[], Sample], changed: bool, skipped: str = "", **options: object
) -> Case:
    made = source()
    program = made.capture()
    return Case(name, program, changed, {"group": 16} | options, skipped=skipped,
                calibration=lambda: Calibration(batches_for(made), program))  # fmt: skip


CASES = [
    calibrated("layer-norm", uneven, True),
    calibrated("rms-norm", lambda: uneven(lambda: nn.RMSNorm(32)), True),
    calibrated("rms-norm-written-out", lambda: uneven(lambda: tiny.RmsNorm(32)), True),
    calibrated("decoder", lambda: tiny.decoder(kv_heads=4), True, "has other readers"),
    calibrated("gelu-between", tiny.mlp, False, "does not let factors through"),
    calibrated("norm-is-returned", norm_is_returned, False, "also reads its input"),
    calibrated("input-of-the-model", tiny.linear, False, "an input of the model"),
    calibrated("excluded", uneven, False, skip="*"),
]


def relu_between() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (N, 16)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attending(nn.Module):
    """Attention with ``kv_heads`` heads of keys and values behind a norm."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = tiny.Attention(16, 4, kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (N, T, 16)."""
        return self.attention(self.norm(x))


PATTERNS: list[tuple[nn.Module, Tensor, set[str]]] = [
    (relu_between(), normal(5, 16), {"2"}),
    (Gated(), normal(5, 16), {"down"}),
    (Attending(4), normal(2, 5, 16), {"attention.q_proj", "attention.o_proj"}),
    (Attending(2), normal(2, 5, 16), {"attention.q_proj"}),
    (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), normal(5, 16), {"1"}),
    (nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 8)), normal(5, 16), set()),
    (nn.Sequential(nn.Linear(16, 16), nn.ReLU6(), nn.Linear(16, 8)), normal(5, 16), set()),
    (nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1), nn.Linear(16, 8)), normal(5, 16), set()),
    (nn.Sequential(nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 8)), normal(5, 16),
     set()),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(PATTERNS)))
def test_random_factors_leave_the_function_as_it_was(at: int) -> None:
    module, x, wanted = PATTERNS[at]
    program = capture(module.double().eval(), (x.double(),))
    before = program.run(x.double())
    edges, skipped = find_edges_to_scale(program, lambda path: True)
    assert {edge.group.layers[0].path for edge in edges} == wanted
    assert wanted or skipped
    for number, edge in enumerate(edges):
        generator = torch.Generator().manual_seed(number)
        width = edge.group.layers[0].shape[1]
        scale_edge(program, edge, 2 ** (6 * torch.rand(width, generator=generator) - 3).double())
    program.refresh()
    assert float((program.run(x.double()) - before).abs().max()) < 1e-10


def test_rounding_loses_less_after_scaling() -> None:
    made = uneven()
    program = made.capture()
    data = [normal(64, 32, seed=s) for s in range(3)]
    fresh = normal(500, 32, seed=9)
    wanted = program.run(fresh)
    rounding = ("quantize-weights", {"group": 16, "activations": "float", "min_size": 0})
    plain = run_with(program, data, rounding)
    scaled = run_with(program, data, ("scale-awq", {"group": 16}), rounding)
    errors = [float((r.run(fresh) - wanted).square().mean()) for r in (plain, scaled)]
    assert errors[1] < 0.8 * errors[0]
    kept = scaled.steps[0].stats["error_kept"]
    assert kept and all(0 < share <= 1 for share in kept.values())


def test_ranges_for_the_output_clip_what_costs_the_output_least() -> None:
    layer = nn.Linear(64, 16, bias=False)
    program = capture(layer.eval(), (correlated(4, 64),), ({0: torch.export.Dim("batch")},))
    data = [correlated(80, 64, seed=s) for s in range(2)]
    wanted = program.run(data[0])
    errors = {}
    for ranges in ("mse", "output"):
        options = {"ranges": ranges, "activations": "float", "min_size": 0, "bits": 3}
        result = run_with(program, data, ("quantize-weights", options))
        errors[ranges] = float((result.run(data[0]) - wanted).square().mean())
    assert errors["output"] < 0.9 * errors["mse"]
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline([make_pass("quantize-weights", {"ranges": "output"})]).run(program)


@pytest.mark.parametrize("power", [0.0, 0.5, 0.95])
def test_factors_are_positive_and_finite_for_dead_and_huge_channels(power: float) -> None:
    factors = awq_factors(torch.tensor([0.0, 1e-30, 1.0, 1e30]), power)
    assert bool(torch.isfinite(factors).all())
    assert bool((factors > 0).all())
    assert float(factors.max() * factors.min()) == pytest.approx(1, rel=1e-4)
