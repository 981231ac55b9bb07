"""The planned order of an ONNX model is kept only where fresh processes take less memory by it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mopt import ordered_artifact
from mopt.lowering import lower
from mopt.measure import Sample, Side, Subject
from mopt.ordered_artifact import lower_in_better_order
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests.tiny import Apply, normal, sample


def fan() -> tuple[Program, Program]:
    """Three large results and three small ones of them, as written and as planned."""

    def function(_: Apply, x: Tensor) -> Tensor:
        large = [torch.outer(x + k, x) for k in range(3)]
        return torch.stack([part.sum() for part in large])

    program = sample(Apply(function), normal(16)).capture()
    return program, Pipeline([make_pass("plan-memory", {"for_device": True})]).run(program)


def processes(monkeypatch: pytest.MonkeyPatch, peaks: dict[str, Sequence[int]]) -> list[str]:
    """What fresh processes are to have taken, by label; gives the labels asked for."""
    asked: list[str] = []

    def measured(subject: Subject, *, samples: int) -> Side:
        asked.append(subject.label)
        assert samples == len(peaks[subject.label])
        found = tuple(Sample(1.0, 1, 1.0, peak) for peak in peaks[subject.label])
        return Side(subject.label, found)

    monkeypatch.setattr(ordered_artifact, "measure_one", measured)
    return asked


def test_every_process_must_take_less(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = fan()
    made = {id(program): lower(program, "onnx") for program in (before, after)}
    monkeypatch.setattr(ordered_artifact, "lower", lambda program, _: made[id(program)])
    for planned, kept in (((80, 85, 90), True), ((80, 80, 99), False), ((99, 98, 97), False)):
        asked = processes(monkeypatch, {"as written": (95, 99, 97), "planned order": planned})
        tried = lower_in_better_order(before, after, "onnx")
        assert asked == ["as written", "planned order"]
        assert (tried.kept_plan, tried.written_bytes, tried.planned_bytes) == (
            kept, 99, max(planned),
        )  # fmt: skip
        want = [op for op in _operators(tried.artifact.folder / "model.onnx") if op in _WATCHED]
        assert (want == ["large", "small"] * 3) == kept
    with made[id(after)].load() as run:
        assert torch.allclose(torch.as_tensor(run(normal(16))), before.run(normal(16)), rtol=1e-5)


def test_without_a_move_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = processes(monkeypatch, {})
    program, _ = fan()
    tried = lower_in_better_order(program, program.copy(), "onnx")
    assert (tried.kept_plan, tried.written_bytes, tried.planned_bytes) == (False, None, None)
    assert asked == []


_WATCHED = ("large", "small")
_KINDS = {"Mul": "large", "MatMul": "large", "ReduceSum": "small"}


def _operators(path: object) -> list[str]:
    import onnx

    return [_KINDS.get(node.op_type, node.op_type) for node in onnx.load(str(path)).graph.node]
