"""The pipeline believes no pass: every claim is checked, and the culprit is named."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mopt.errors import LimitError, PassError, UsageError
from mopt.pass_base import (
    Numerics,
    Pass,
    PassContext,
    PassResult,
    Progress,
    Skip,
    option,
    register_pass,
)
from mopt.pipeline import Pipeline, Step, rounding_bound
from mopt.program import Program, iter_calls
from mopt.registry import make_pass
from tests import tiny
from tests.case import Snapshot, assert_same, outputs
from tests.tiny import normal, sample

aten = torch.ops.aten
SIMPLIFY = ("fold-constants", "remove-no-ops", "merge-duplicates", "fold-batch-norm")


def three_layers() -> Program:
    """Linear layers 0, 2 and 4 with gelu between them."""
    layers = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    return sample(layers, normal(3, 6), dynamic=True).capture()


def planted(
    run: Callable[[Program, PassContext], PassResult | None],
    numerics: Numerics = Numerics.EXACT,
    tolerance: float = 0.0,
) -> Pass:
    """A pass that does what ``run`` does and claims to have changed the program."""

    @register_pass("planted", numerics=numerics, tolerance=tolerance)
    @dataclass(frozen=True, kw_only=True)
    class Planted(Pass):
        """Planted."""

        def run(self, program: Program, ctx: PassContext) -> PassResult:
            return run(program, ctx) or PassResult(changed=True)

    return Planted()


def replace_weight(program: Program, layer: int, change: Callable[[Tensor], Tensor]) -> None:
    """Give the n-th linear layer another weight, the proper way."""
    call = list(iter_calls(program, aten.linear.default))[layer]
    weight = call.args[1]
    assert isinstance(weight, torch.fx.Node)
    new = program.add_weight("new.weight", change(program.weight(weight)), before=call)
    call.replace_input_with(weight, new)


def fails(one: Pass, program: Program | None = None, ctx: PassContext | None = None) -> PassError:
    """The error of running a pass; the program must be as it was before."""
    program = program or three_layers()
    before = Snapshot.of(program)
    with pytest.raises(PassError) as found:
        Pipeline([make_pass("remove-no-ops", {}), one]).run(program, ctx)
    assert before.differences(program) == []
    assert found.value.message.startswith("planted: ")
    return found.value


# ---- lies about what changed


def test_says_changed_but_is_not() -> None:
    error = fails(planted(lambda program, ctx: PassResult(changed=True)))
    assert error.code == "false-claim"
    assert "says the program is changed, but its fingerprint is the same" in error.message


def test_says_unchanged_but_the_graph_is() -> None:
    def run(program: Program, ctx: PassContext) -> PassResult:
        (gelu, _) = iter_calls(program, aten.gelu.default)
        program.replace_call(gelu, aten.relu.default, (gelu.args[0],))
        return PassResult(changed=False)

    error = fails(planted(run))
    assert error.code == "false-claim"
    assert "says the program is unchanged, but its fingerprint differs" in error.message


def test_says_unchanged_but_a_weight_is() -> None:
    def run(program: Program, ctx: PassContext) -> PassResult:
        replace_weight(program, 1, lambda weight: weight + 1)
        return PassResult(changed=False)

    assert fails(planted(run)).code == "false-claim"


# ---- numbers


def test_an_exact_pass_that_changes_a_number() -> None:
    def run(program: Program, ctx: PassContext) -> None:
        replace_weight(program, 1, lambda weight: weight * (1 + 2**-23))

    error = fails(planted(run))
    assert error.code == "numerics"
    assert "is exact, but changes the output; first at node 'linear_1'" in error.message
    assert error.site is not None
    assert error.site.startswith("2")  # the second layer of the Sequential


def test_a_rounding_pass_beyond_its_bound() -> None:
    def run(program: Program, ctx: PassContext) -> None:
        replace_weight(program, 2, lambda weight: weight * 1.001)

    error = fails(planted(run, Numerics.ROUNDING, tolerance=1e-5))
    assert error.code == "numerics"
    assert "its bound is 1e-05; first at node 'linear_2'" in error.message
    within = planted(run, Numerics.ROUNDING, tolerance=1e-2)
    step = Pipeline([within]).run(three_layers()).steps[-1]
    assert step.drift is not None
    assert 1e-5 < step.drift.relative < 1e-2


def test_every_output_has_its_own_bound() -> None:
    """A small output must not hide behind a large one."""
    program = tiny.sample(
        tiny.Apply(lambda m, x: (m.a(x) * 1e6, m.b(x)), a=nn.Linear(6, 4), b=nn.Linear(6, 4)),
        normal(3, 6),
    ).capture()

    def run(program: Program, ctx: PassContext) -> None:
        replace_weight(program, 1, lambda weight: weight * 1.1)

    error = fails(planted(run, Numerics.ROUNDING, tolerance=1e-5), program)
    assert error.code == "numerics"


@pytest.mark.parametrize("numerics", list(Numerics))
def test_nan_is_never_accepted(numerics: Numerics) -> None:
    def run(program: Program, ctx: PassContext) -> None:
        replace_weight(program, 1, lambda weight: weight / 0 * 0)

    error = fails(planted(run, numerics, tolerance=1.0))
    assert error.code == "numerics"
    assert "gives NaN or infinity; first at node 'linear_1'" in error.message
    assert error.site is not None
    assert error.site.startswith("2")


def test_nan_does_not_hide_behind_an_infinity_that_was_there() -> None:
    program = sample(
        tiny.Apply(lambda m, x: (m.a(x), (x * 0).log()), a=nn.Linear(6, 4)), normal(3, 6)
    ).capture()

    def run(program: Program, ctx: PassContext) -> None:
        replace_weight(program, 0, lambda weight: weight / 0 * 0)

    assert "gives NaN" in fails(planted(run, Numerics.LOSSY), program).message


def test_a_lossy_pass_is_measured_against_the_captured_program() -> None:
    def run(program: Program, ctx: PassContext) -> None:
        replace_weight(program, 1, lambda weight: weight * 1.1)

    lossy = planted(run, Numerics.LOSSY)
    once, twice = Pipeline([lossy, lossy]).run(three_layers()).steps
    assert once.drift is not None
    assert twice.drift is not None
    assert twice.drift.max_abs > 1.5 * once.drift.max_abs > 0
    assert twice.drift.sqnr_db < once.drift.sqnr_db < 60


def test_bounds_in_sixteen_bits_allow_for_sixteen_bits() -> None:
    one = planted(lambda program, ctx: None, Numerics.ROUNDING, tolerance=1e-5)
    single, half = three_layers(), nn.Linear(4, 4).bfloat16()
    assert rounding_bound(one, single) == 1e-5
    program = sample(half, normal(2, 4).bfloat16()).capture()
    assert rounding_bound(one, program) == 8 * torch.finfo(torch.bfloat16).eps


# ---- broken programs


def test_a_pass_that_raises() -> None:
    def run(program: Program, ctx: PassContext) -> None:
        raise ZeroDivisionError("of course")

    error = fails(planted(run))
    assert error.code == "pass-failed"
    assert error.message == "planted: failed with ZeroDivisionError: of course"
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_an_error_of_the_pass_itself_is_passed_on() -> None:
    def run(program: Program, ctx: PassContext) -> None:
        raise UsageError("group is odd", code="bad-option")

    with pytest.raises(UsageError, match="group is odd"):
        Pipeline([planted(run)]).run(three_layers())


@pytest.mark.parametrize("changed", [True, False])
def test_a_shared_weight_written_in_place(changed: bool) -> None:
    kept: dict[str, Tensor] = {}

    def run(program: Program, ctx: PassContext) -> PassResult:
        call = list(iter_calls(program, aten.linear.default))[1]
        weight = program.weight(call.args[1])
        kept["weight"], kept["content"] = weight, weight.clone()
        weight.mul_(2)
        return PassResult(changed=changed)

    with pytest.raises(PassError) as found:
        Pipeline([planted(run)]).run(three_layers())
    assert found.value.code == "shared-weight-written"
    assert "wrote to weight '2.weight'" in found.value.message


def test_a_node_that_reads_a_weight_that_is_not_there() -> None:
    def run(program: Program, ctx: PassContext) -> None:
        call = list(iter_calls(program, aten.linear.default))[1]
        with program.graph.inserting_before(call), pytest.warns(UserWarning):
            node = program.graph.get_attr("gone.weight")
        node.meta.update(call.meta)
        call.replace_input_with(call.args[1], node)

    error = fails(planted(run))
    assert error.code == "missing-weight"
    assert "reads weight 'gone.weight', which does not exist" in error.message
    assert error.site is not None
    assert error.site.startswith("2")


def test_a_weight_of_the_wrong_shape() -> None:
    def run(program: Program, ctx: PassContext) -> None:
        replace_weight(program, 1, lambda weight: weight[:, :-1])

    error = fails(planted(run))
    assert error.code == "bad-shapes"
    assert "node 'linear_1' cannot work on its inputs" in error.message
    assert error.site is not None
    assert error.site.startswith("2")


def test_a_graph_out_of_order() -> None:
    def run(program: Program, ctx: PassContext) -> None:
        first, *_, last = iter_calls(program, aten.linear.default)
        first.prepend(last)

    assert fails(planted(run)).code == "malformed-graph"


def test_a_program_that_fails_only_when_it_runs() -> None:
    """Shapes do not tell that an index is out of range."""

    def run(program: Program, ctx: PassContext) -> None:
        (call,) = iter_calls(program, aten.embedding.default)
        more = program.insert_call(aten.add.Tensor, (call.args[1], 1000), like=call)
        call.args = (call.args[0], more)

    error = fails(planted(run), tiny.embedding().capture())
    assert error.code == "program-fails"
    assert "fails at node 'embedding': IndexError" in error.message


def test_an_output_that_is_lost() -> None:
    program = sample(tiny.Apply(lambda m, x: (x + 1, x + 2)), normal(3, 4)).capture()

    def run(program: Program, ctx: PassContext) -> None:
        (output,) = [node for node in program.nodes if node.op == "output"]
        first, _ = output.args[0]
        output.args = ((first,),)

    error = fails(planted(run), program)
    assert error.code == "output-count"
    assert error.message == "planted: the program has 1 outputs, it had 2"


def test_an_output_of_another_dtype() -> None:
    def run(program: Program, ctx: PassContext) -> None:
        (output,) = [node for node in program.nodes if node.op == "output"]
        (last,) = output.args[0]
        half = program.insert_call(aten.to.dtype, (last, torch.float16), like=output)
        output.args = ((half,),)

    error = fails(planted(run, Numerics.LOSSY))
    assert error.code == "output-shape"
    assert "became torch.float16 (3, 4), it was torch.float32 (3, 4)" in error.message


def test_statistics_must_be_plain() -> None:
    def run(program: Program, ctx: PassContext) -> PassResult:
        return PassResult(changed=False, stats={"range": torch.ones(2)})

    with pytest.raises(PassError) as found:
        Pipeline([planted(run)]).run(three_layers())
    assert found.value.code == "bad-statistics"


# ---- promises


@register_pass("promising", numerics=Numerics.EXACT)
@dataclass(frozen=True, kw_only=True)
class Promising(Pass):
    """States what it needs and what it leaves."""

    needs: str = option("", help="why it cannot run")
    leaves: str = option("", help="what it left undone")

    def requires(self, program: Program, ctx: PassContext) -> str | None:
        return self.needs or None

    def ensures(self, program: Program, ctx: PassContext) -> str | None:
        return self.leaves or None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(changed=False, stats={"ran": 1}, skipped=[Skip("here", "because")])


def test_what_a_pass_requires_and_ensures() -> None:
    Pipeline([Promising()]).run(three_layers())
    with pytest.raises(PassError, match="promising: weights are not float") as found:
        Pipeline([Promising(needs="weights are not float")]).run(three_layers())
    assert found.value.code == "pass-requires"
    with pytest.raises(PassError, match="did not keep its promise: 2 layers are left") as found:
        Pipeline([Promising(leaves="2 layers are left")]).run(three_layers())
    assert found.value.code == "pass-ensures"


# ---- the loop itself


def test_steps_tell_the_story() -> None:
    program = tiny.small_cnn().capture()
    seen: list[Step] = []
    passes = [make_pass(name, {}) for name in SIMPLIFY] + [Promising()]
    result = Pipeline(passes, watchers=[seen.append]).run(program)
    assert seen == result.steps
    assert [step.name for step in seen] == [*SIMPLIFY, "promising"]
    fold = seen[3]
    assert (fold.changed, fold.numerics, fold.stats) == (True, "rounding", {"folded": 4})
    assert fold.bytes_before == program.size_bytes()
    assert fold.bytes_after == result.size_bytes() < fold.bytes_before
    assert fold.flops_after == result.flops() < fold.flops_before
    assert seen[4].skipped == (Skip("here", "because"),)
    as_json = seen[4].as_json()
    assert as_json["skipped"] == [{"site": "here", "reason": "because"}]
    assert as_json["drift"]["sqnr_db"] is None or as_json["drift"]["sqnr_db"] > 100


def test_steps_of_earlier_pipelines_are_kept_and_a_split_pipeline_is_the_whole() -> None:
    program = tiny.small_cnn().capture()
    passes = [make_pass(name, {}) for name in SIMPLIFY]
    whole = Pipeline(passes).run(program)
    half = Pipeline(passes[:2]).run(program)
    split = Pipeline(passes[2:]).run(half)
    assert split.fingerprint() == whole.fingerprint()
    assert [step.name for step in split.steps] == [step.name for step in whole.steps]
    assert len(half.steps) == 2


def test_no_passes_give_a_copy() -> None:
    program = three_layers()
    result = Pipeline([]).run(program)
    assert result is not program
    assert result.fingerprint() == program.fingerprint()


def test_the_input_program_is_untouched_by_a_whole_pipeline() -> None:
    program = tiny.decoder().capture()
    before = Snapshot.of(program)
    args = program.args
    expected = outputs(program, args, {})
    Pipeline([make_pass(n, {}) for n in (*SIMPLIFY, "fold-norm-affine")]).run(program)
    assert before.differences(program) == []
    assert program.steps == []
    assert_same(expected, outputs(program, args, {}), "the captured program")


def test_time_is_checked_before_every_pass() -> None:
    ctx = PassContext(deadline=time.monotonic() - 1)
    with pytest.raises(LimitError, match="time is up while running promising") as found:
        Pipeline([Promising()]).run(three_layers(), ctx)
    assert found.value.code == "max-minutes"


def test_numbers_that_were_infinite_before_may_stay_so() -> None:
    """A mask of minus infinity is no reason to refuse an exact pass."""
    program = sample(
        tiny.Apply(lambda m, x: (x.masked_fill(x > 0, -math.inf) * 1, x.sin())), normal(3, 4)
    ).capture()
    result = Pipeline([make_pass("remove-no-ops", {})]).run(program)
    assert result.steps[-1].drift is not None
    assert result.steps[-1].drift.max_abs == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": -1}, "option max_bytes is -1, expected at least 0"),
        ({"max_bytes": "many"}, "option max_bytes is 'many', expected int"),
        ({"max_bytes": float("inf")}, "option max_bytes is inf, expected int"),
        ({"max_bytes": float("nan")}, "option max_bytes is nan, expected int"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as found:
        make_pass("fold-constants", options)
    assert found.value.code == "bad-option"
    assert message in found.value.message


def test_progress_tells_a_pass_from_the_checks_after_it() -> None:
    said: list[str] = []

    class Heard(Progress):
        def step(self, done: int, total: int, unit: str) -> None:
            said.append(f"{done} of {total} {unit}")

    def run(program: Program, ctx: PassContext) -> PassResult:
        ctx.progress.step(3, 4, "layers")
        return PassResult(changed=False)

    Pipeline([planted(run)]).run(three_layers(), PassContext(progress=Heard()))
    assert said == [
        "0 of 1 passes, running the model before them", "0 of 1 passes, now planted",
        "3 of 4 layers", "0 of 1 passes, checking planted",
    ]  # fmt: skip
