"""Copies that are run from kept values give what they give when run from the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from mopt.frontend import capture
from mopt.passes.choose import _reruns
from mopt.passes.choose._reruns import Reruns, default_limit
from mopt.program import Program


class Blocks(nn.Module):
    """A residual stream with a split, a view, and a value that is read far away."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        start = x = self.first(x)
        for block in self.blocks:
            left, right = block(x).chunk(2, dim=-1)
            x = x + left * torch.sigmoid(right)
        return (x + start).reshape(-1, 6)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x) + 1.0)
        return out


def scaled(program: Program, which: int) -> Program:
    """A copy whose ``which``-th linear layer gives twice as much, under a new name."""
    changed = program.copy()
    call = [n for n in changed.graph.nodes if n.target is torch.ops.aten.linear.default][which]
    with changed.graph.inserting_after(call):
        twice = changed.graph.call_function(torch.ops.aten.mul.Tensor, (call, 2.0))
    twice.meta = dict(call.meta)
    call.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    changed.graph_module.recompile()
    return changed


@pytest.fixture(name="calls")
def _calls() -> list[tuple[tuple[Tensor, ...], dict[str, object]]]:
    return [((torch.randn(3, 12),), {}) for _ in range(2)]


@pytest.mark.parametrize("limit", [0, 200, 700, 10**6])
@pytest.mark.parametrize("make", [Blocks, Pair])
def test_equals_a_run_from_the_start(
    make: Callable[[], nn.Module], limit: int, calls: list[tuple[tuple[Tensor, ...], dict]]
) -> None:
    program = capture(make().eval(), calls[0][0], None)
    reruns = Reruns(program, calls, limit)
    for index, (args, _) in enumerate(calls):
        assert torch.equal(reruns.outputs[index][0], program.run_flat(*args)[0])
        for which in range(2 if make is Pair else 5):
            changed = scaled(program, which)
            assert torch.equal(reruns.run(changed, index)[0], changed.run_flat(*args)[0])


def test_what_is_written_into_a_value_is_not_left_out(
    calls: list[tuple[tuple[Tensor, ...], dict]],
) -> None:
    """Nothing reads what the in-place addition returns; the layer after it reads the memory."""
    program = capture(Pair().eval(), calls[0][0], None)
    (add,) = [n for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    add.target = torch.ops.aten.add_.Tensor
    add.replace_all_uses_with(add.args[0], delete_user_cb=lambda user: user is not add)
    program.graph_module.recompile()
    changed = scaled(program, 1)
    expected = changed.run_flat(*calls[0][0])[0]
    assert torch.equal(Reruns(program, calls, 10**6).run(changed, 0)[0], expected)


def test_what_is_kept_fits_and_saves_work(
    calls: list[tuple[tuple[Tensor, ...], dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = capture(Blocks().eval(), calls[0][0], None)
    ran: list[fx.Node] = []
    plain = fx.Interpreter.run_node
    last = scaled(program, 4)
    counts = []
    for limit in (0, 700, 10**6):
        reruns = Reruns(program, calls, limit)
        kept = sum(t.untyped_storage().nbytes() for values in reruns._values
                   for t in values.values())  # fmt: skip
        assert kept <= limit
        with monkeypatch.context() as patch:
            patch.setattr(fx.Interpreter, "run_node", lambda s, n: ran.append(n) or plain(s, n))
            reruns.run(last, 0)
        counts.append(sum(node.op == "call_function" for node in ran))
        ran.clear()
    assert counts[0] > counts[1] > counts[2]


def test_small_models_may_keep_more(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(Blocks().eval(), (torch.randn(3, 12),), None)
    weights = sum(t.nbytes for t in program.graph_module.state_dict().values())
    assert default_limit(program) == (1 << 29) - weights
    monkeypatch.setattr(_reruns, "_TOGETHER_BYTES", weights)
    assert default_limit(program) == weights // 4


def test_the_key_of_kept_losses_covers_this_file() -> None:
    from mopt.passes.choose import _sensitivity

    assert str(Path(_reruns.__file__)) in _sensitivity._SOURCES
