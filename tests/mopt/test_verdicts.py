"""Checks of programs are done once for the same content, and again for any other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import mopt
from mopt.cache import Cache
from mopt.driver import Settings
from mopt.errors import PassError
from mopt.lowering import Artifact
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, register_pass
from mopt.pipeline import Pipeline, Step
from mopt.program import Program, iter_calls
from mopt.verdicts import check_key, recall
from tests.tiny import normal, sample


def layers(width: int = 8) -> Program:
    """Two linear layers."""
    return sample(nn.Sequential(nn.Linear(6, width), nn.Linear(width, 4)), normal(3, 6)).capture()


@register_pass("nudge", numerics=Numerics.ROUNDING, tolerance=1e-2)
@dataclass(frozen=True, kw_only=True)
class Nudge(Pass):
    """Multiply the first weight by a number."""

    by: float = 1.001

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        call = next(iter_calls(program, torch.ops.aten.linear.default))
        old = call.args[1]
        assert isinstance(old, torch.fx.Node)
        new = program.add_weight("nudged", program.weight(old) * self.by, before=call)
        call.replace_input_with(old, new)
        return PassResult(changed=True)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that were run on their sample inputs."""
    found: list[Program] = []
    plain = Program.run_flat

    def noted(self: Program, *args: object, **kwargs: object) -> list[object]:
        found.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Program, "run_flat", noted)
    return found


def step(folder: Path, program: Program, by: float = 1.001) -> Step:
    """What a pipeline with one pass says of it, with a cache in ``folder``."""
    ctx = PassContext(cache=Cache(folder, worth_seconds=0))
    return Pipeline([Nudge(by=by)]).run(program, ctx).steps[-1]


def test_a_second_run_checks_nothing_and_says_the_same(tmp_path: Path, runs: list[Program]) -> None:
    first = step(tmp_path, layers())
    assert len(runs) == 2 and first.drift is not None and first.drift.relative > 0
    again = step(tmp_path, layers())
    assert len(runs) == 2 and again.drift == first.drift
    step(tmp_path, layers(9))  # another model
    step(tmp_path, layers(), by=1.002)  # another result
    assert len(runs) == 6


def test_other_inputs_and_threads_are_another_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = layers()

    def key(**more: object) -> object:
        return check_key([program], [program.args], "pass", **more)

    found = key()
    assert found == key() and found != key(bound=1.0)
    assert found != check_key([program], [(normal(3, 6, seed=9),)], "pass")
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    assert found != key()


def test_a_key_that_depends_on_much_is_found_again(tmp_path: Path) -> None:
    program, cache = layers(), Cache(tmp_path, worth_seconds=0)
    files = {f"kernel-{index}": 64 * "a" for index in range(100)}
    seen = []
    for _ in range(2):
        key = check_key([program], [normal(2, 2, seed=i) for i in range(99)], "x", files=files)
        assert recall(cache, key, lambda: seen.append(0) or 5) == 5
    assert len(seen) == 1


def test_a_pass_that_breaks_its_promise_is_found_out_every_time(
    tmp_path: Path, runs: list[Program]
) -> None:
    for _ in range(2):
        with pytest.raises(PassError) as caught:
            step(tmp_path, layers(), by=2.0)
        assert caught.value.code == "numerics"
    assert len(runs) == 4


def test_operators_that_mopt_does_not_know_are_checked_every_time() -> None:
    program = layers()
    call = next(iter_calls(program, torch.ops.aten.linear.default))
    call.target = torch.nn.functional.linear  # no operator with a name of its own
    assert check_key([program], [], "pass") is None


def test_what_is_no_data_is_not_kept(tmp_path: Path) -> None:
    cache, seen = Cache(tmp_path, worth_seconds=0), []

    def check() -> float:
        seen.append(0)
        return math.nan

    for _ in range(2):
        assert math.isnan(recall(cache, {"check": "x"}, check))
    assert len(seen) == 2


def test_a_second_compile_runs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopt.driver.Cache", partial(Cache, tmp_path, worth_seconds=0))
    runs: list[Program] = []
    plain = Program.run
    monkeypatch.setattr(
        Program, "run", lambda self, *a, **k: (runs.append(self), plain(self, *a, **k))[1]
    )

    def compiled(seed: int) -> tuple[Artifact, int]:
        torch.manual_seed(0)
        runs.clear()
        made = mopt.compile(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU()), (normal(3, 64),), recipe="int4-weight",
            backend="eager", calibration=[(normal(3, 64, seed=seed),)],
            settings=Settings(measure=False),
        )  # fmt: skip
        return made, len(runs)

    (first, some), (again, none), (other, few) = (compiled(seed) for seed in (1, 1, 2))
    assert some > few > none == 0
    assert first.manifest["files"] == again.manifest["files"] == other.manifest["files"]
    quality = [one.report.data["quality"] for one in (first, again, other) if one.report]
    assert quality[0] == quality[1] != quality[2]
