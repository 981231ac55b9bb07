"""Capture: whole where torch can, in parts where it cannot, and never by changing the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from mopt.errors import CaptureError, InputError
from mopt.frontend import capture
from mopt.islands import IslandProgram
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import iter_calls, source_line
from mopt.registry import make_pass
from tests import tiny
from tests.case import assert_same, outputs
from tests.tiny import normal

HERE = Path(__file__).name
aten = torch.ops.aten


class Branching(nn.Module):
    """A Python branch on a tensor's value between two captured parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        if y.sum() > 0:  # the line the report must name
            y = y + 1
        return self.head(y)


class Counting(nn.Module):
    """A Python loop whose length depends on a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 0.1:
            x = x * torch.sigmoid(self.step(x)) * 0.5
        return x


class ThroughNumpy(nn.Module):
    """NumPy in the middle of forward, in a module with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.middle = Middle()
        self.after = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.middle(self.before(x)))


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy((x * self.scale).detach().numpy() + 1)


class Printing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        print("shape", tuple(x.shape))
        return self.linear(x)


class CountingBuffer(nn.Module):
    """forward writes to a buffer, as a module that counts its calls does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(x) + self.calls


# ---- whole


@pytest.mark.parametrize("example", [1, 2, 5])
def test_a_dynamic_batch_serves_every_size_whatever_the_example_is(example: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    program = capture(model, (normal(example, 4),), ({0: Dim("batch")},))
    assert program.coverage.is_whole
    assert program.args[0].shape == (example, 4)  # not the size export was shown
    for batch in (1, 2, 3, 17):
        x = normal(batch, 4, seed=batch)
        assert_same([model(x).detach()], outputs(program, (x,), {}), f"batch {batch}")


def test_dynamic_shapes_by_name_with_positional_inputs_of_size_one() -> None:
    model = tiny.small_cnn().module.eval()
    program = capture(model, (normal(1, 3, 8, 8),), {"input": {0: Dim("batch")}})
    x = normal(3, 3, 8, 8)
    assert_same([model(x).detach()], outputs(program, (x,), {}), "batch 3")


def test_a_dynamic_size_the_model_does_not_take_is_explained() -> None:
    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, -1) + 1

    with pytest.raises(InputError) as found:
        capture(Even(), (normal(2, 4),), ({0: Dim("batch")},))
    assert found.value.code == "bad-dynamic-shapes"
    assert "specialized it to be a constant (2)" in found.value.message
    assert found.value.hint == "batch = 2"


def test_dynamic_shapes_of_another_structure_are_explained() -> None:
    with pytest.raises(InputError) as found:
        capture(nn.Linear(4, 2), (normal(2, 4),), {"no_such_input": {0: Dim("batch")}})
    assert found.value.code == "bad-dynamic-shapes"


def test_keyword_inputs_are_taken_in_any_order() -> None:
    class TwoInputs(nn.Module):
        def forward(self, first: Tensor, second: Tensor, scale: float = 2.0) -> Tensor:
            return first - second * scale

    first, second = normal(2, 4, seed=1), normal(2, 4, seed=2)
    program = capture(TwoInputs(), {"second": second, "first": first})
    assert_same([first - second * 2], outputs(program, (), {"first": first, "second": second}), "")
    with pytest.raises(TypeError, match=r"expected keyword inputs \['second', 'first'\]"):
        program.flat_inputs((), {"first": first})


def test_outputs_keep_their_nesting() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"logits": x + 1, "hidden": (x * 2, [x * 3])}

    x = normal(2, 4)
    found = capture(Nested(), (x,)).run(x)
    assert list(found) == ["logits", "hidden"]
    assert isinstance(found["hidden"][1], list)
    assert torch.equal(found["hidden"][1][0], x * 3)


def test_tied_weights_stay_shared() -> None:
    program = tiny.decoder().capture()
    ((table, *_),) = [call.args for call in iter_calls(program, aten.embedding.default)]
    *_, head = iter_calls(program, aten.linear.default)
    left, right = program.weight(table), program.weight(head.args[1])
    assert left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    model = tiny.decoder().module
    assert program.parameter_count() == sum(p.numel() for p in model.parameters())
    assert program.size_bytes() == 4 * program.parameter_count()


def test_a_module_called_twice_has_one_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    program = capture(Twice(), (normal(2, 4),))
    calls = list(iter_calls(program, aten.linear.default))
    assert len(calls) == 2
    assert len({call.args[1] for call in calls}) == 1
    assert program.parameter_count() == 20


def test_nodes_name_the_users_file() -> None:
    program = capture(Named(), (normal(2, 4),))
    (add,) = iter_calls(program, aten.add.Tensor)
    file, _, line = source_line(add).rpartition(":")
    assert Path(file).name == HERE
    text = Path(__file__).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert text.strip() == "return x + 1  # named"


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1  # named


# ---- the model is left alone


def test_capture_leaves_the_model_and_the_generator_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    capture(model, (normal(3, 4),))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [True, False, True]
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_failing_capture_leaves_the_training_flag_too() -> None:
    model = Branching().train()
    with pytest.raises(CaptureError):
        capture(model, (normal(2, 4),), require_coverage=1.5)
    assert all(module.training for module in model.modules())


def test_capture_prints_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    capture(Branching(), (normal(2, 4),))
    capture(Printing(), (normal(2, 4),))
    printed = capfd.readouterr()
    assert printed.err == ""
    assert set(printed.out.splitlines()) == {"shape (2, 4)"}


# ---- in parts


def test_a_branch_on_a_value_leaves_islands_that_compute_the_same() -> None:
    model = Branching().eval()
    program = capture(model, (normal(2, 4),))
    assert isinstance(program, IslandProgram)
    assert list(program.parts()) == ["encoder", "head"]
    assert program.coverage.parameters == 1.0
    assert program.coverage.flops == 1.0
    (outside,) = program.coverage.outside
    assert outside.path == ""
    assert outside.reason == "a Python branch or loop depends on a tensor's value"
    file, _, line = outside.source.rpartition(":")
    assert Path(file).name == HERE
    text = Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert "the line the report must name" in text
    for seed in range(4):  # both ways of the branch
        x = normal(2, 4, seed=seed)
        assert_same([model(x).detach()], outputs(program, (x,), {}), f"seed {seed}")


def test_an_island_runs_the_original_for_other_shapes() -> None:
    model = Branching().eval()
    program = capture(model, (normal(2, 4),))
    x = normal(5, 4)
    assert_same([model(x).detach()], outputs(program, (x,), {}), "batch 5")


def test_a_loop_whose_length_is_not_known() -> None:
    model = Counting().eval()
    program = capture(model, (normal(2, 4),))
    assert list(program.parts()) == ["step"]
    x = normal(2, 4, seed=3) * 10
    assert_same([model(x).detach()], outputs(program, (x,), {}), "loop")


def test_numpy_inside_is_counted_as_outside() -> None:
    model = ThroughNumpy().eval()
    program = capture(model, (normal(2, 4),))
    assert list(program.parts()) == ["before", "after"]
    assert program.coverage.parameters == pytest.approx(40 / 44)
    assert [part.path for part in program.coverage.outside] == ["", "middle"]
    assert "numpy" in program.coverage.outside[1].reason
    assert program.coverage.outside[1].parameters == 4
    x = normal(2, 4)
    assert_same([model(x).detach()], outputs(program, (x,), {}), "numpy")


def test_passes_work_on_the_islands() -> None:
    model = Branching().eval()
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[:1].expand(2, 4))
        model.head.bias.zero_()
        model.encoder[2].bias.zero_()
    program = capture(model, (normal(2, 4),))
    result = Pipeline([make_pass("merge-duplicates", {})]).run(program, PassContext())
    assert not result.steps[-1].changed
    x = normal(2, 4)
    assert_same(outputs(program, (x,), {}), outputs(result, (x,), {}), "islands")


def test_too_little_coverage_is_an_error_that_names_the_place() -> None:
    with pytest.raises(CaptureError) as found:
        capture(ThroughNumpy(), (normal(2, 4),), require_coverage=0.95)
    assert found.value.code == "coverage"
    assert "90.9% of the model was captured, 95.0% are required; outside: middle" in str(
        found.value
    )
    assert found.value.site is not None
    assert HERE in found.value.site
    assert capture(ThroughNumpy(), (normal(2, 4),), require_coverage=0.9)


def test_a_model_of_which_nothing_can_be_captured() -> None:
    with pytest.raises(CaptureError) as found:
        capture(Middle(), (normal(2, 4),))
    assert found.value.code == "capture-failed"


def test_a_buffer_that_forward_writes_to_is_an_error() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x + self.calls

    with pytest.raises(CaptureError) as found:
        capture(Inner(), (normal(2, 4),))
    assert "forward writes to buffers of the model (calls)" in str(found.value)


def test_next_to_a_buffer_that_forward_writes_to_the_rest_is_captured() -> None:
    model = CountingBuffer()
    program = capture(model, (normal(2, 4),))
    assert list(program.parts()) == ["linear"]
    assert "forward writes to buffers" in program.coverage.outside[0].reason
    assert float(model.calls) == 0  # capture ran the model several times


def test_writing_to_what_einsum_may_return_is_not_writing_to_a_weight() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(normal(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.einsum("ni,io->no", x, self.weight)
            y += 1
            return y

    model, x = InPlace(), normal(2, 4)
    program = capture(model, (x,))
    assert program.coverage.is_whole
    assert_same([model(x).detach()], outputs(program, (x,), {}), "in place")


# ---- what the user gave is wrong


def test_a_model_that_does_not_run_says_where() -> None:
    with pytest.raises(InputError) as found:
        capture(Branching(), (normal(2, 3),))
    assert found.value.code == "model-does-not-run"
    assert "[(2, 3)]" in found.value.message
    assert found.value.site is not None
    assert HERE in found.value.site


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        (normal(2, 4) / 0, "non-finite-input"),
        ({1, 2}, "bad-example-inputs"),
        ("text", "bad-example-inputs"),
    ],
)
def test_inputs_that_cannot_be_right(inputs: object, code: str) -> None:
    with pytest.raises(InputError) as found:
        capture(nn.Linear(4, 4), inputs if isinstance(inputs, str | set) else (inputs,))
    assert found.value.code == code


def test_a_weight_with_nan_is_refused_by_name() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.bias[2] = float("nan")
    with pytest.raises(InputError, match="weight 'bias' holds NaN") as found:
        capture(model, (normal(2, 4),))
    assert found.value.code == "non-finite-weight"


def test_only_modules_are_captured() -> None:
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module, found function"):
        capture(lambda x: x, (normal(2, 4),))  # type: ignore[arg-type]
