"""Calibration data: every form a user may give, and an error that names the batch and the input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from mopt.calibration import Calibration
from mopt.errors import InputError, LimitError
from mopt.frontend import capture
from mopt.islands import IslandProgram
from mopt.observers import Histogram, MinMax
from mopt.pass_base import PassContext
from mopt.program import Program, iter_calls
from tests.tiny import normal

_aten = torch.ops.aten


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x) * mask[:, None]


def positional(dynamic: bool = True) -> Program:
    batch = Dim("batch")
    shapes = {"x": {0: batch}, "mask": {0: batch}} if dynamic else None
    return capture(TwoInputs().eval(), (normal(2, 4), torch.ones(2, dtype=torch.int64)), shapes)


def by_name() -> Program:
    inputs = {"x": normal(2, 4), "mask": torch.ones(2, dtype=torch.int64)}
    batch = Dim("batch")
    return capture(TwoInputs().eval(), inputs, {"x": {0: batch}, "mask": {0: batch}})


def batch(rows: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(rows, 4, seed=seed), torch.ones(rows, dtype=torch.int64)


@pytest.mark.parametrize("make", [positional, by_name])
@pytest.mark.parametrize("form", ["tuple", "list", "mapping", "numpy"])
def test_every_form_of_a_batch_reaches_the_program(make: Any, form: str) -> None:
    program = make()
    x, mask = batch(5)
    raw: Any = {
        "tuple": (x, mask),
        "list": [x, mask],
        "mapping": {"mask": mask, "x": x},
        "numpy": {"x": x.numpy(), "mask": mask.numpy()},
    }[form]
    ((args, kwargs),) = list(Calibration([raw], program))
    expected = ((x, mask), {}) if program.args else ((), {"x": x, "mask": mask})
    assert torch.equal(program.run(*args, **kwargs), program.run(*expected[0], **expected[1]))
    assert len(program.flat_inputs(args, kwargs)) == 2


def test_one_tensor_is_a_batch() -> None:
    program = capture(nn.Linear(4, 3).eval(), (normal(2, 4),))
    data = Calibration([normal(2, 4), normal(2, 4).numpy()], program)
    assert [args[0].shape for args, _ in data] == [(2, 4), (2, 4)]


def test_a_generator_can_be_read_again_and_in_between() -> None:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for seed in range(4):
            yield batch(seed=seed)

    data = Calibration(batches(), positional())
    first = next(iter(data))
    whole = [args[0] for args, _ in data]
    assert len(whole) == 4
    assert torch.equal(first[0][0], whole[0])
    assert all(torch.equal(a, b[0][0]) for a, b in zip(whole, data, strict=True))
    assert len(list(data.for_part(data.program))) == 4


def test_limit() -> None:
    data = Calibration([batch(seed=s) for s in range(5)], positional(), limit=3)
    assert len(list(data)) == data.expected_batches == 3


@pytest.mark.parametrize(
    ("raw", "code", "message"),
    [
        ((normal(2, 4).double(), torch.ones(2, dtype=torch.int64)), "calibration-dtype",
         r"batch 1, input 'x': expected float32\[\w+, 4\], found float64\[2, 4\]"),
        ((normal(2, 4), torch.ones(2)), "calibration-dtype",
         r"batch 1, input 'mask': expected int64\[\w+\], found float32\[2\]"),
        ((normal(2, 5), torch.ones(2, dtype=torch.int64)), "calibration-shape",
         r"batch 1, input 'x': expected float32\[\w+, 4\], found float32\[2, 5\]"),
        ((normal(4), torch.ones(2, dtype=torch.int64)), "calibration-shape",
         r"batch 1, input 'x': expected .*, found float32\[4\]"),
        ((normal(3, 4), torch.ones(2, dtype=torch.int64)), "calibration-shape",
         r"batch 1, input 'mask': \w+ is 2, but 3 in input 'x'"),
        ((normal(2, 4),), "calibration-structure", "batch 1 has the structure"),
        ({"x": normal(2, 4)}, "calibration-structure", r"batch 1 has the inputs \['x'\]"),
        ({"x": normal(2, 4), "mask": torch.ones(2), "labels": 1}, "calibration-structure",
         "'labels'"),
        ((normal(2, 4), "text"), "calibration-structure", "input 'mask': expected int64"),
        ((normal(2, 4) / 0, torch.ones(2, dtype=torch.int64)), "non-finite-calibration",
         "batch 1, input 'x' holds NaN or infinity"),
        ((normal(0, 4), torch.ones(0, dtype=torch.int64)), "empty-calibration",
         r"batch 1, input 'x': float32\[0, 4\] holds no values"),
        (7, "bad-example-inputs", "must be a tuple or a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_batch_is_named(raw: Any, code: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        list(Calibration([batch(), raw], positional()))
    assert caught.value.code == code


@pytest.mark.parametrize("batches", [[], iter([]), ()])
def test_no_data_is_an_error(batches: Any) -> None:
    with pytest.raises(InputError, match="holds no batches") as caught:
        list(Calibration(batches, positional()))
    assert caught.value.code == "empty-calibration"


@pytest.mark.parametrize("given", [normal(2, 4), np.zeros((2, 4)), {"x": normal(2, 4)}, "x.npz"])
def test_a_lone_batch_is_not_data(given: Any) -> None:
    with pytest.raises(InputError, match="must be an iterable of batches") as caught:
        Calibration(given, positional())
    assert caught.value.code == "bad-calibration"


def test_a_short_last_batch_needs_a_dynamic_dimension() -> None:
    batches = [batch(2), batch(1)]
    assert [args[0].shape[0] for args, _ in Calibration(batches, positional())] == [2, 1]
    with pytest.raises(InputError, match=r"batch 1, input 'x': expected float32\[2, 4\]") as caught:
        list(Calibration(batches, positional(dynamic=False)))
    assert "drop a last batch that is short" in (caught.value.hint or "")


def test_a_constant_input_must_be_the_captured_one() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: int) -> Tensor:
            return x * factor

    program = capture(Scaled(), (normal(2), 3))
    assert len(list(Calibration([(normal(2), 3)], program))) == 1
    with pytest.raises(InputError, match="expected 3, which the model was captured with") as caught:
        list(Calibration([(normal(2), 4)], program))
    assert caught.value.code == "calibration-constant"


def test_collect_shows_every_value_of_every_batch() -> None:
    program = positional()
    node = next(n for n in program.graph.nodes if "linear" in n.name)
    batches = [batch(rows, seed) for seed, rows in enumerate((2, 2, 3))]
    seen, extremes = Histogram(), MinMax()
    data = Calibration(batches, program).for_part(program)
    assert data.collect({node: seen}, PassContext()) == 3
    data.collect({node: extremes}, PassContext())
    values = torch.cat([linear_of(program, x) for x, _ in batches])
    assert seen.total == values.numel() == 7 * 3
    assert (seen.low, seen.high) == (extremes.low, extremes.high)
    assert (seen.low, seen.high) == (float(values.min()), float(values.max()))


def linear_of(program: Program, x: Tensor) -> Tensor:
    weights = program.weights()
    return torch.nn.functional.linear(x, weights["layer.weight"], weights["layer.bias"]).detach()


def test_collect_can_replace_a_weight() -> None:
    program = positional()
    weight = next(n for n in program.graph.nodes if n.target == "layer.weight")
    bias = next(n for n in program.graph.nodes if n.target == "layer.bias")
    node = next(n for n in program.graph.nodes if "linear" in n.name)
    seen = MinMax()
    zero = {(node, weight): torch.zeros(3, 4), (node, bias): torch.full((3,), 2.5)}
    Calibration([batch()], program).collect({node: seen}, PassContext(), zero)
    assert (seen.low, seen.high) == (2.5, 2.5)


def test_a_replaced_weight_is_only_replaced_for_its_call() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(3, 2))

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(nn.functional.embedding(ids, self.table), self.table)

    program = capture(Tied(), (torch.tensor([0, 1]),))
    table, head = (
        next(iter_calls(program, target))
        for target in (_aten.embedding.default, _aten.linear.default)
    )
    seen = {table: MinMax(), head: MinMax()}
    other = {(head, head.args[1]): torch.full((3, 2), 5.0)}
    Calibration([(torch.tensor([0, 2]),)], program).collect(seen, PassContext(), other)
    assert (seen[table].high, seen[head].high) == (1.0, 10.0)


def test_collecting_stops_behind_the_last_observed_node() -> None:
    def fail(x: Tensor) -> Tensor:
        raise AssertionError("nothing observes this")

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(torch.exp(x))

    program, seen = capture(Twice(), (torch.zeros(2),)), MinMax()
    first, second = iter_calls(program, torch.ops.aten.exp.default)
    second.target = fail
    Calibration([(torch.zeros(2),)], program).collect({first: seen}, PassContext())
    assert seen.high == 1.0


def test_an_overflow_inside_the_model_names_its_node() -> None:
    class Overflow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(x)

    program = capture(Overflow(), (torch.zeros(2),))
    node = next(n for n in program.graph.nodes if n.op == "call_function")
    with pytest.raises(InputError, match="node 'exp' holds NaN or infinity") as caught:
        Calibration([(torch.full((2,), 1e4),)], program).collect({node: MinMax()}, PassContext())
    assert caught.value.code == "non-finite-activation"
    assert "test_calibration.py" in (caught.value.site or "")


def test_collect_stops_when_time_is_up() -> None:
    program = positional()
    with pytest.raises(LimitError, match="calibrating"):
        Calibration([batch()], program).collect({}, PassContext(deadline=0.0))


class WithIsland(nn.Module):
    """A loop whose length depends on a value, around a part that can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x[0, 0].abs()) + 1):
            x = self.inner(x) + 1
        return x


def test_a_part_of_a_model_with_islands_gets_its_own_inputs() -> None:
    model = WithIsland().eval()
    x = torch.full((2, 4), 2.0)
    program = capture(model, (x,))
    assert isinstance(program, IslandProgram)
    ((path, part),) = program.parts().items()
    data = Calibration([(x,), (torch.zeros(2, 4),)], program).for_part(part)
    calls = [args[0] for args, _ in data]
    assert path == "inner"
    assert len(calls) == 3 + 1, "three rounds of the loop for the first batch, one for the second"
    assert torch.equal(calls[0], x)
    with torch.no_grad():
        assert torch.allclose(calls[1], model.inner(x) + 1)


def test_a_part_that_the_data_never_reaches_is_an_error() -> None:
    program = capture(WithIsland().eval(), (torch.zeros(2, 4),))
    assert isinstance(program, IslandProgram)
    (part,) = program.parts().values()
    data = Calibration([(torch.zeros(2, 4),)], program)
    part.args = (torch.zeros(7, 4),)
    with pytest.raises(InputError, match="1 calls with other shapes of the captured part") as error:
        list(data.for_part(part))
    assert error.value.code == "uncovered-part"
