"""Coupled axes: what goes together, what stays, and that removing equals zeroing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.axes import Mask
from mopt.coupling import Coupling, find_coupling, shrink
from mopt.program import Program
from tests import tiny
from tests.case import Sample, Snapshot, assert_near, outputs
from tests.pruned import check_pruned, some_removed
from tests.strategies import samples
from tests.tiny import Apply, normal, sample


def groups_of(source: Sample) -> dict[str, tuple[str, int, int]]:
    """Kind, number of units and width of every group by the path of its first writer."""
    found = find_coupling(source.capture())
    return {group.path: (group.kind, len(group.units), group.width) for group in found.groups}


def members_of(source: Sample, path: str) -> set[str]:
    """The weights of a group."""
    found = find_coupling(source.capture())
    group = next(group for group in found.groups if group.path == path)
    return {str(member.weight.target) for member in group.members}


def conv(ins: int, outs: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, 3, padding=1, **options)


def image_net(forward: Callable[..., Tensor], **parts: nn.Module) -> Sample:
    return sample(Apply(forward, **parts), normal(2, 4, 8, 8), dynamic=True)


def flattened() -> Sample:
    return image_net(
        lambda m, x: m.fc(F.max_pool2d(m.conv(x).relu(), 4).flatten(1)),
        conv=conv(4, 8), fc=nn.Linear(32, 3),
    )  # fmt: skip


def viewed() -> Sample:
    return image_net(
        lambda m, x: m.fc(m.conv(x).reshape(x.shape[0], 8 * 64)),
        conv=conv(4, 8), fc=nn.Linear(512, 3),
    )  # fmt: skip


def depthwise() -> Sample:
    return image_net(
        lambda m, x: m.out(m.norm(m.deep(F.relu6(m.expand(x))))),
        expand=conv(4, 16), deep=conv(16, 16, groups=16), norm=nn.BatchNorm2d(16),
        out=conv(16, 4),
    )  # fmt: skip


def many_groups() -> Sample:
    return image_net(
        lambda m, x: m.out(m.mid(m.first(x).relu()).relu()),
        first=conv(4, 16), mid=conv(16, 32, groups=8), out=conv(32, 4),
    )  # fmt: skip


def few_groups() -> Sample:
    return image_net(
        lambda m, x: m.out(m.mid(m.first(x).relu()).relu()),
        first=conv(4, 16), mid=conv(16, 32, groups=2), out=conv(32, 4),
    )  # fmt: skip


def transposed() -> Sample:
    return image_net(
        lambda m, x: m.out(m.up(m.first(x).relu())),
        first=conv(4, 8), up=nn.ConvTranspose2d(8, 12, 2, stride=2), out=conv(12, 4),
    )  # fmt: skip


def transposed_groups() -> Sample:
    return image_net(
        lambda m, x: m.out(m.up(m.first(x).relu())),
        first=conv(4, 8), up=nn.ConvTranspose2d(8, 16, 2, stride=2, groups=4), out=conv(16, 4),
    )  # fmt: skip


def concatenated() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x).relu()
        return m.out(torch.cat([a, x, b, a], 1))

    return image_net(forward, a=conv(4, 8), b=conv(4, 6), out=conv(26, 4))


def split_up() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        left, right = m.both(x).chunk(2, dim=1)
        return m.out(left * right.sigmoid())

    return image_net(forward, both=conv(4, 16), out=conv(8, 4))


def sliced() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        y = m.both(x)
        return m.left(y[:, :6]) + m.right(y[:, 6:])

    return image_net(forward, both=conv(4, 16), left=conv(6, 4), right=conv(10, 4))


def group_normed() -> Sample:
    return image_net(
        lambda m, x: m.out(m.norm(m.first(x)).relu()),
        first=conv(4, 16), norm=nn.GroupNorm(4, 16), out=conv(16, 4),
    )  # fmt: skip


def squeezed_and_excited() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        y = m.first(x)
        gate = m.grow(m.shrink(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid()
        return m.out(y * gate)

    return image_net(
        forward, first=conv(4, 16), shrink=nn.Conv2d(16, 4, 1), grow=nn.Conv2d(4, 16, 1),
        out=conv(16, 4),
    )  # fmt: skip


def fused_qkv() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = m.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.out(y.transpose(1, 2).reshape(batch, length, 32))

    parts = {"qkv": nn.Linear(16, 96), "out": nn.Linear(32, 16)}
    return sample(Apply(forward, **parts), normal(2, 5, 16), dynamic=True)


def written_out_attention() -> Sample:
    def forward(m: Apply, x: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, 4, 8).permute(0, 2, 1, 3)

        q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
        weights = (q @ k.transpose(-1, -2) / 8**0.5 + m.bias).softmax(-1)
        return m.out((weights @ v).permute(0, 2, 1, 3).contiguous().view(batch, length, 32))

    linears = {name: nn.Linear(16, 32) for name in "qkv"}
    bias = nn.Parameter(torch.zeros(4, 5, 5))
    return sample(
        Apply(forward, **linears, out=nn.Linear(32, 16), bias=bias), normal(2, 5, 16), dynamic=True
    )


def shared_layer() -> Sample:
    return sample(
        Apply(lambda m, x: m.out(m.mix(m.mix(m.up(x)).relu())), up=nn.Linear(8, 16),
              mix=nn.Linear(16, 16), out=nn.Linear(16, 4)),
        normal(3, 8), dynamic=True,
    )  # fmt: skip


def recurrent(**options: Any) -> Sample:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 12, batch_first=True, **options)
            self.out = nn.Linear(24 if options.get("bidirectional") else 12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x)[0])

    return sample(Tagger(), normal(2, 5, 6))


def recurrent_both_ways() -> Sample:
    return recurrent(num_layers=2, bidirectional=True)


# Kind, units and width of each group.
EXPECTED = {
    tiny.mlp: {"0": ("neurons", 32, 1)},
    flattened: {"conv": ("channels", 8, 1)},
    viewed: {"conv": ("channels", 8, 1)},
    depthwise: {"expand": ("channels", 16, 1)},
    many_groups: {"first": ("channels", 8, 2)},
    few_groups: {"first": ("channels", 8, 2), "mid": ("channels", 16, 2)},
    transposed: {"first": ("channels", 8, 1), "up": ("channels", 12, 1)},
    transposed_groups: {"first": ("channels", 4, 2)},
    concatenated: {"a": ("channels", 8, 1), "b": ("channels", 6, 1)},
    split_up: {"both": ("channels", 8, 2)},
    group_normed: {"first": ("channels", 4, 4)},
    squeezed_and_excited: {"first": ("channels", 16, 1), "shrink": ("channels", 4, 1)},
    fused_qkv: {"qkv": ("heads", 4, 24)},
    written_out_attention: {"q": ("heads", 4, 8)},
    recurrent_both_ways: {"lstm": ("hidden units", 12, 1)},
    shared_layer: {"up": ("neurons", 16, 1)},
}


@pytest.mark.parametrize("source", EXPECTED, ids=lambda source: source.__name__)
def test_groups_and_removal(source: Callable[[], Sample]) -> None:
    assert groups_of(source()) == EXPECTED[source]
    program = source().capture()
    before = Snapshot.of(program)
    result = check_pruned(program, 0.3)
    assert before.differences(program) == []
    assert result.parameter_count() < program.parameter_count()


def test_a_residual_stream_is_one_group_and_the_inner_channels_are_their_own() -> None:
    source = tiny.small_cnn()
    assert groups_of(source) == {
        "0": ("channels", 8, 1), "1.conv1": ("channels", 8, 1), "2.conv1": ("channels", 8, 1)
    }  # fmt: skip
    stream = members_of(source, "0")
    assert {"0.weight", "1.conv2.weight", "2.conv1.weight", "1.bn2.weight", "5.weight"} <= stream
    assert "1.bn1.weight" not in stream
    check_pruned(source.capture(), 0.3)


def test_grouped_queries_go_with_their_keys_and_the_tied_head_stays() -> None:
    source = tiny.decoder()
    kinds = {path: found for path, found in groups_of(source).items() if "blocks.0" in path}
    assert sorted(kinds.values()) == [("heads", 2, 8), ("neurons", 64, 1)]
    found = find_coupling(source.capture())
    heads = next(group for group in found.groups if group.kind == "heads")
    rows = {str(m.weight.target).split(".")[-2]: int((m.units >= 0).sum()) for m in heads.members}
    assert rows["q_proj"] == 2 * rows["k_proj"] == 2 * rows["v_proj"] == rows["o_proj"]
    assert any("reduced over this width" in skip.reason for skip in found.skips)
    result = check_pruned(source.capture(), 0.5)
    assert {tuple(w.shape) for name, w in result.weights().items() if name == "head.weight"} == {
        (64, 32)
    }


def silenced(program: Program, found: Coupling, removed: Mask) -> Program:
    """A copy in which nothing writes the removed units."""
    copy, now = program.copy(), {}
    calls = {node.name: node for node in copy.graph.nodes}
    gone = np.append(removed, False)
    for group in found.groups:
        for member in group.members:
            if member.role == "in":
                continue
            call, key = calls[member.call.name], (member.call.name, member.weight.name)
            reader = now.get(key, calls[member.weight.name])
            weight = copy.weight(reader).clone()
            places = torch.from_numpy(np.flatnonzero(gone[member.units]))
            now[key] = copy.add_weight("silent", weight.index_fill_(member.axis, places, 0), call)
            call.replace_input_with(reader, now[key])
    copy.refresh()
    return copy


def rms_stream(*, written_out: bool) -> Sample:
    def norm(m: Apply, x: Tensor) -> Tensor:
        if written_out:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1) * m.norm.weight
        return m.norm(x)

    def forward(m: Apply, ids: Tensor) -> Tensor:
        x = m.table(ids)
        x = x + m.down(torch.relu(m.up(norm(m, x))))
        return m.out(norm(m, x))

    parts = {"table": nn.Embedding(11, 16), "up": nn.Linear(16, 24), "down": nn.Linear(24, 16),
             "norm": nn.RMSNorm(16, eps=0.1), "out": nn.Linear(16, 5)}  # fmt: skip
    return sample(Apply(forward, **parts), torch.arange(8).reshape(2, 4))


@pytest.mark.parametrize("written_out", [False, True])
def test_the_residual_width_shrinks_through_rms_norms_as_if_it_were_silent(
    written_out: bool,
) -> None:
    program = rms_stream(written_out=written_out).capture()
    assert [g.kind for g in find_coupling(program).groups] == ["neurons"]
    found = find_coupling(program, through_norms=True)
    assert sorted(len(group.units) for group in found.groups) == [16, 24]
    removed = some_removed(found, 0.3)
    reference = silenced(program, found, removed)
    expected = outputs(reference, program.args, {})
    result = program.copy()
    found = find_coupling(result, through_norms=True)
    shrink(result, found, removed)
    result.verify()
    assert {t.shape[1] for n, t in result.weights().items() if "table" in n} == {12}
    assert_near(expected, outputs(result, program.args, {}), tolerance=2e-5, what="stream")


def test_the_residual_width_of_layer_norms_and_images_shrinks_too() -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    program = sample(layers, normal(3, 8)).capture()
    found = find_coupling(program, through_norms=True)
    (group,) = found.groups
    assert group.kind == "stream channels"
    removed = some_removed(found, 0.25)
    shrink(program, found, removed)
    program.verify()
    assert outputs(program, program.args, {})[0].shape == (3, 4)


def test_slices_of_one_layer_shrink_apart() -> None:
    found = find_coupling(sliced().capture())
    assert sorted(len(group.units) for group in found.groups) == [6, 10]
    check_pruned(sliced().capture(), 0.4)


@pytest.mark.parametrize(("forward", "reason"), [
    (lambda m, x: m.out(F.softmax(m.up(x), -1)), "softmax"),
    (lambda m, x: m.out(F.layer_norm(m.up(x), (16,))), "statistics are over this width"),
    (lambda m, x: m.out(m.up(x) - m.up(x).mean(-1, keepdim=True)), "reduced over this width"),
    (lambda m, x: m.out(torch.fft.fft(m.up(x)).real), "fft"),
    (lambda m, x: m.out(m.up(x)[:, [3, 1, 0] * 5 + [2]]), "index"),
    (lambda m, x: m.out(m.up(x) + torch.arange(16.0)), "keeps its width"),
])  # fmt: skip
def test_what_cannot_be_tracked_stays_whole_and_says_why(
    forward: Callable[..., Tensor], reason: str
) -> None:
    parts = {"up": nn.Linear(8, 16), "out": nn.Linear(16, 4)}
    program = sample(Apply(forward, **parts), normal(3, 8), dynamic=True).capture()
    found = find_coupling(program)
    assert found.groups == []
    assert any(skip.site == "up" and reason in skip.reason for skip in found.skips), found.skips


def test_memory_shared_in_another_shape_stays() -> None:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.out(m.up(x).relu()) + m.up.weight.view(-1)[:4]

    parts = {"up": nn.Linear(8, 16), "out": nn.Linear(16, 4)}
    module = sample(Apply(forward, **parts), normal(3, 8), dynamic=True)
    check_pruned(module.capture(), 0.5)
    program = tiny.mlp().capture()
    call = next(node for node in program.graph.nodes if "linear" in str(node.target))
    flat = program.weight(call.args[1]).view(-1)
    extra = program.add_weight("flat", flat, call)
    program.insert_call(torch.ops.aten.sum.default, (extra,), like=call)
    program.refresh()
    assert find_coupling(program).groups == []


def test_removing_twice_composes_and_removing_nothing_changes_nothing() -> None:
    program = tiny.small_cnn(16).capture()
    copy = program.copy()
    found = find_coupling(copy)
    shrink(copy, found, np.zeros(found.unit_count, dtype=bool))
    assert copy.fingerprint() == program.fingerprint()
    check_pruned(check_pruned(program, 0.25), 0.25, seed=1)


def test_the_last_channel_counts_as_emptying() -> None:
    found = find_coupling(tiny.small_cnn(2).capture())
    removed = np.zeros(found.unit_count, dtype=bool)
    removed[found.groups[0].units] = True
    assert found.would_empty(removed)
    assert not found.would_empty(some_removed(found, 0.5))


def test_analysis_gives_the_same_twice() -> None:
    def told(found: Coupling) -> list[tuple[str, list[int]]]:
        return [(group.path, group.units.tolist()) for group in found.groups]

    program: Program = tiny.decoder().capture()
    assert told(find_coupling(program)) == told(find_coupling(program))


@settings(max_examples=12)
@given(samples(max_steps=8))
def test_random_programs_without_units_equal_those_with_them_zeroed(made: Sample) -> None:
    check_pruned(made.capture(), 0.34)
