"""quantize-experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers the operator)
from torch import Tensor, nn

from mopt.calibration import Calibration
from mopt.errors import InputError, PassError
from mopt.frontend import capture
from mopt.lowering import load, lower
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests import tiny
from tests.case import Case
from tests.passes.quantize.calibrated import correlated
from tests.tiny import normal

SMALL = {"min_size": 0, "group": 16}
WIDTH, EXPERTS = 32, 4


class Mixture(nn.Module):
    """Rows sorted by expert, two products per expert with a relu between."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(normal(EXPERTS, 48, WIDTH, seed=1) / WIDTH**0.5)
        self.down = nn.Parameter(normal(EXPERTS, WIDTH, 48, seed=2) / 48**0.5)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        product = torch.ops.transformers.grouped_mm_fallback
        hidden = torch.relu(product(rows, self.up.transpose(-2, -1), ends))
        out: Tensor = product(hidden, self.down.transpose(-2, -1), ends)
        return out


def ends_of(*counts: int) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def program() -> Program:
    shapes = ({0: torch.export.Dim("rows", min=2, max=4096)}, None)
    return capture(Mixture().eval(), (correlated(12, WIDTH), ends_of(3, 5, 0, 4)), shapes)


def data(*splits: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    return [(correlated(sum(s), WIDTH, seed=i), ends_of(*s)) for i, s in enumerate(splits)]


def run_with(given: Program, batches: list[tuple[Tensor, Tensor]], **options: object) -> Program:
    context = PassContext(calibration=Calibration(batches, given))
    return Pipeline([make_pass("quantize-experts", SMALL | options)]).run(given, context)


def case(name: str, changed: bool, options: dict[str, object], **more: object) -> Case:
    captured = program()
    batches = data((10, 6, 0, 8), (2, 9, 0, 20))
    return Case(name, captured, changed, SMALL | options,
                calibration=lambda: Calibration(batches, captured), **more)  # fmt: skip


CASES = [
    case("int4", True, {}, tolerance=0.3),
    case("two-in-eight-bits", True, {"high_share": 0.5}, tolerance=0.3),
    case("small-experts-stay", False, {"min_size": 4096}, skipped="fewer than"),
    case("mostly-padding", False, {"group": 128}, skipped="padding"),
    Case("no-experts", tiny.mlp(), False,
         calibration=lambda: Calibration([(normal(4, 16),)], tiny.mlp().capture())),
]  # fmt: skip


def test_experts_that_get_no_token_are_rounded_too_and_named() -> None:
    captured = program()
    result = run_with(captured, data((10, 6, 0, 8), (2, 9, 0, 20)))
    stats = result.steps[-1].stats
    assert stats["rows"]["up"] == [12, 15, 0, 28]
    assert stats["unseen"] == {"up": [2], "down": [2]}
    rows, ends = correlated(50, WIDTH, seed=9), ends_of(0, 0, 50, 0)
    wanted, found = captured.run(rows, ends), result.run(rows, ends)
    error = (found - wanted).square().mean() / wanted.square().mean()
    assert float(error) < 0.02
    assert result.size_bytes() < 0.25 * captured.size_bytes()


def test_the_experts_with_most_rows_and_error_get_more_bits() -> None:
    captured = program()
    result = run_with(captured, data((2, 60, 1, 40)), high_share=0.5)
    stats = result.steps[-1].stats
    assert stats["average_bits"] == {"up": 6.0, "down": 6.0}
    call = next(n for n in result.nodes if "grouped_linear" in str(n.target))
    assert call.args[4] == [4, 8, 4, 8]


def test_rounding_for_its_own_rows_beats_rounding_for_the_average() -> None:
    """An expert whose rows differ from the others' gets scales and codes for those."""
    captured = program()
    odd = correlated(400, WIDTH, seed=3) * torch.where(torch.arange(WIDTH) < 8, 6.0, 0.3)
    plain = correlated(400, WIDTH, seed=4)
    batch = (torch.cat([odd, plain]), ends_of(400, 400, 0, 0))
    fresh = correlated(300, WIDTH, seed=5) * torch.where(torch.arange(WIDTH) < 8, 6.0, 0.3)
    wanted = captured.run(fresh, ends_of(300, 0, 0, 0))
    own = run_with(captured, [batch]).run(fresh, ends_of(300, 0, 0, 0))
    average = run_with(captured, [(plain, ends_of(0, 400, 0, 0))])
    other = average.run(fresh, ends_of(300, 0, 0, 0))
    errors = [float((one - wanted).square().mean()) for one in (own, other)]
    assert errors[0] < 0.8 * errors[1]


def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    captured = program()
    result = run_with(captured, data((10, 6, 3, 8)), high_share=0.25)
    run = load(lower(result, "onnx").save(tmp_path / "out"))
    for counts in [(3, 5, 0, 4), (0, 0, 12, 0), (1, 1, 1, 1)]:
        rows, ends = correlated(sum(counts), WIDTH, seed=7), ends_of(*counts)
        wanted, found = result.run(rows, ends), torch.as_tensor(run(rows, ends))
        assert torch.allclose(found, wanted, atol=0.02 * float(wanted.abs().max())), counts


def test_bad_input_is_refused() -> None:
    with pytest.raises(PassError, match="needs calibration data") as missing:
        Pipeline([make_pass("quantize-experts", SMALL)]).run(program())
    assert missing.value.code == "pass-requires"
    broken = Mixture().eval()
    with torch.no_grad():
        broken.up[1, 2, 3] = float("inf")
    captured = capture(broken, (correlated(12, WIDTH), ends_of(3, 5, 0, 4)))
    with pytest.raises(InputError, match="'up' holds 1 values") as found:
        run_with(captured, [(correlated(12, WIDTH), ends_of(3, 5, 0, 4))])
    assert found.value.code == "non-finite-weight"
