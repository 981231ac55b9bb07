"""Program: copies, weights, text, fingerprint, numbers, running."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from mopt.errors import PassError
from mopt.hashes import tensor_hash
from mopt.layers import find_layers
from mopt.program import Program, is_dynamic, iter_calls, module_path, site_of
from tests import tiny
from tests.case import Snapshot, assert_same, outputs
from tests.tiny import Apply, normal, sample

aten = torch.ops.aten


def test_copy_shares_weights_and_nothing_else() -> None:
    program = tiny.mlp().capture()
    copy = program.copy()
    assert copy.fingerprint() == program.fingerprint()
    for path, weight in program.weights().items():
        assert copy.weights()[path].data_ptr() == weight.data_ptr()
    before = Snapshot.of(program)
    (gelu,) = iter_calls(copy, aten.gelu.default)
    copy.replace_call(gelu, aten.relu.default, (gelu.args[0],))
    copy.plan["memory"] = {"peak": 1}
    copy.refresh()
    assert before.differences(program) == []
    assert program.plan == {}
    assert copy.fingerprint() != program.fingerprint()
    x = (normal(3, 16),)
    assert not torch.equal(outputs(copy, x, {})[0], outputs(program, x, {})[0])


def test_a_plan_is_copied_deeply() -> None:
    program = tiny.mlp().capture()
    program.plan["order"] = [1, 2]
    copy = program.copy()
    copy.plan["order"].append(3)
    assert program.plan["order"] == [1, 2]


def test_copy_leaves_unread_weights_behind() -> None:
    program = tiny.mlp().capture()
    (first, _) = iter_calls(program, aten.linear.default)
    node = program.add_weight("spare", torch.zeros(1000), before=first)
    assert "spare" not in program.weights()
    assert program.size_bytes() == tiny.mlp().capture().size_bytes()
    program.graph.erase_node(node)
    assert hasattr(program.graph_module, "spare")
    assert not hasattr(program.copy().graph_module, "spare")


def test_add_weight_finds_a_free_name_beside_the_old_one() -> None:
    program = tiny.mlp().capture()
    (first, _) = iter_calls(program, aten.linear.default)
    nodes = [program.add_weight("0.weight", torch.ones(n), before=first) for n in (1, 2)]
    assert [str(node.target) for node in nodes] == ["0.weight_2", "0.weight_3"]
    assert program.weight(nodes[1]).shape == (2,)
    deep = program.add_weight("0.codes.packed", torch.ones(2), before=first)
    assert program.weight(deep).shape == (2,)
    assert not program.weight(deep).requires_grad


def test_constant_is_only_for_weights() -> None:
    program = tiny.linear().capture()
    (call,) = iter_calls(program, aten.linear.default)
    assert program.constant(call.args[0]) is None
    assert program.constant(3.0) is None
    weight = program.constant(call.args[1])
    assert weight is not None
    assert weight.shape == (4, 8)


def test_a_new_call_knows_its_place_in_the_model() -> None:
    program = tiny.mlp().capture()
    (gelu,) = iter_calls(program, aten.gelu.default)
    new = program.replace_call(gelu, aten.relu.default, (gelu.args[0],))
    program.refresh()
    assert module_path(new) == "1"
    assert new.meta["val"].shape[1] == 32
    assert is_dynamic(new)
    assert site_of(new).startswith("1")


def test_shapes_follow_an_edit_up_to_where_they_are_as_before() -> None:
    program = tiny.mlp().capture()
    first, second = iter_calls(program, aten.linear.default)
    wider = program.add_weight("wide", torch.zeros(40, 16), before=first)
    bias = program.add_weight("bias", torch.zeros(40), before=first)
    narrow = program.add_weight("narrow", torch.zeros(16, 40), before=second)
    first.args = (first.args[0], wider, bias)
    second.args = (second.args[0], narrow, second.args[2])
    program.refresh()
    (gelu,) = iter_calls(program, aten.gelu.default)
    assert gelu.meta["val"].shape[1] == 40
    assert second.meta["val"].shape[1] == 16
    program.verify()


def test_shapes_follow_a_weight_that_is_replaced_under_its_name() -> None:
    program = tiny.linear(8, 4).capture()
    program.graph_module.weight = nn.Parameter(torch.zeros(5, 8))
    with pytest.raises(PassError) as found:
        program.verify()
    assert found.value.code == "bad-shapes"


# ---- text and fingerprint


def test_text_is_readable_and_free_of_this_machine() -> None:
    text = tiny.conv_bn_relu().capture().text()
    assert "%input_1: float32[s31, 4, 6, 6] = placeholder input" in text
    assert "= aten.conv2d.default(%input_1, %_0_weight, None, [1, 1], [1, 1])  # 0\n" in text
    assert text.endswith("return [%relu]\n")
    assert os.sep + "tests" not in text
    assert "0x" not in text


_PRINT = """
import torch
from tests import tiny
program = tiny.decoder().capture()
print(program.fingerprint())
print(program.text())
"""


def test_text_and_fingerprint_are_the_same_in_every_process(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root}
        done = subprocess.run(
            [sys.executable, "-c", _PRINT], env=environment, cwd=tmp_path, check=True,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        found.add(done.stdout)
    assert len(found) == 1


def change_weight(program: Program) -> None:
    (call,) = iter_calls(program, aten.linear.default)
    weight = program.weight(call.args[1]).clone()
    weight[0, 0] += 2**-20
    call.replace_input_with(call.args[1], program.add_weight("weight", weight, before=call))


def change_argument(program: Program) -> None:
    (add,) = iter_calls(program, aten.add.Tensor)
    add.args = (add.args[0], 1.0)


def change_nothing(program: Program) -> None:
    program.refresh()


@pytest.mark.parametrize(
    ("edit", "same"),
    [(change_weight, False), (change_argument, False), (change_nothing, True)],
)
def test_fingerprint_sees_every_change(edit: Callable[[Program], None], same: bool) -> None:
    source = sample(Apply(lambda m, x: m.a(x) + 1, a=nn.Linear(4, 4)), normal(2, 4))
    program = source.capture()
    before = program.fingerprint()
    edit(program)
    program.refresh()
    assert (program.fingerprint() == before) is same


def test_hashes_follow_writes_and_do_not_mix_up_views() -> None:
    weight = torch.arange(8.0)
    whole, part = tensor_hash(weight), tensor_hash(weight[:4])
    assert whole != part
    assert tensor_hash(weight[4:]) != part
    assert tensor_hash(weight.reshape(2, 4)) != whole
    assert tensor_hash(weight.clone()) == whole
    assert tensor_hash(weight.view(torch.int32)) != whole
    assert tensor_hash(weight.reshape(2, 4).t()) != tensor_hash(weight.reshape(4, 2))
    weight[7] = 0
    assert tensor_hash(weight) != whole
    assert tensor_hash(weight[:4]) == part
    with torch.inference_mode():
        frozen = torch.ones(3)
        first = tensor_hash(frozen)
        frozen.add_(1)
        assert tensor_hash(frozen) != first


# ---- numbers


def test_sizes_count_shared_weights_once() -> None:
    program = tiny.decoder(vocabulary=64, width=32).capture()
    model = tiny.decoder(vocabulary=64, width=32).module
    count = sum(parameter.numel() for parameter in model.parameters())
    assert program.parameter_count() == count
    assert program.size_bytes() == 4 * count


def test_flops_of_a_linear_layer_and_of_a_convolution() -> None:
    assert tiny.linear(8, 4).capture().flops() == 2 * 3 * 8 * 4
    program = sample(nn.Conv2d(4, 6, 3, padding=1, groups=2), normal(2, 4, 5, 5)).capture()
    assert program.flops() == 2 * (2 * 6 * 5 * 5) * (2 * 9)


def test_flops_of_a_size_that_depends_on_the_data_are_a_lower_bound() -> None:
    program = sample(Apply(lambda m, x: x[x > 0] * 2), normal(3, 4)).capture()
    assert program.flops() >= 12


def test_layers_of_a_decoder() -> None:
    layers = find_layers(tiny.decoder().capture())
    kinds = {layer.path: layer.kind for layer in layers}
    assert kinds["embed"] == "embedding"
    assert kinds["blocks.0.attention.k_proj"] == "linear"
    assert len(layers) == 2 + 2 * 7
    (k_proj,) = [layer for layer in layers if layer.path == "blocks.0.attention.k_proj"]
    assert k_proj.shape == (16, 32)
    assert k_proj.flops == 2 * (2 * 6) * 32 * 16


# ---- running


def test_interpret_sees_and_replaces_every_value() -> None:
    program = tiny.mlp().capture()
    seen: list[str] = []

    def visit(node: fx.Node, value: object) -> Tensor | None:
        seen.append(node.name)
        return torch.zeros_like(value) if node.name == "gelu" else None

    (found,) = program.interpret(visit, (normal(4, 16),))
    bias = program.weights()["2.bias"]
    assert torch.equal(found, bias.expand(4, 16))
    assert seen[-1] == "output"
    assert seen.count("gelu") == 1


def test_running_records_no_gradients() -> None:
    program = tiny.mlp().capture()
    assert not program.run(normal(4, 16).requires_grad_()).requires_grad


def test_flat_outputs_keep_their_order() -> None:
    program = sample(Apply(lambda m, x: {"b": x + 1, "a": [x + 2]}), normal(2, 2)).capture()
    x = normal(2, 2)
    assert_same([x + 1, x + 2], program.run_flat(x), "flat")


def test_the_wrong_number_of_inputs_is_refused() -> None:
    program = tiny.linear().capture()
    with pytest.raises(TypeError, match="expected 1 input tensors, found 2"):
        program.flat_inputs((normal(2, 8), normal(2, 8)), {})
