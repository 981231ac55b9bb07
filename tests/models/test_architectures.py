"""Each architecture has the property that defines it: causality, masking, routing, statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mopt import models
from mopt.models import _moe
from mopt.models._blocks import RotaryAttention, rope_tables, rotate
from mopt.models._convolution import ConvNorm, settle
from mopt.models._entry import seeded


@pytest.mark.parametrize("name", ["llama-mini", "pydoc-gpt", "moe"])
@torch.no_grad()
def test_a_token_does_not_change_what_comes_before(name: str) -> None:
    model = models.load(name)
    module, (ids,) = model.build(), model.example_inputs()
    ids = ids[:, :48]
    changed = ids.clone()
    changed[:, 40] += 1
    before, after = module(ids), module(changed)
    torch.testing.assert_close(after[:, :40], before[:, :40], rtol=0, atol=1e-5)
    assert (after[:, 40:] - before[:, 40:]).abs().amax(dim=(0, 2)).min() > 1e-3


@torch.no_grad()
def test_bert_ignores_padding() -> None:
    model = models.load("bert")
    module, (ids, mask) = model.build(), model.example_inputs()
    assert 0 < (mask == 0).sum() < mask[1].numel()
    other = torch.where(mask == 0, ids + 1, ids) % 30_522
    assert not torch.equal(other, ids)
    hidden, pooled = module(ids, mask)
    hidden_other, pooled_other = module(other, mask)
    kept = mask.bool()
    torch.testing.assert_close(hidden_other[kept], hidden[kept], rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled_other, pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled[1], hidden[1][kept[1]].mean(0), rtol=0, atol=1e-5)


@torch.no_grad()
def test_encoder_decoder_reads_the_unpadded_source_and_earlier_targets() -> None:
    model = models.load("encoder-decoder")
    module, (source, mask, target) = model.build(), model.example_inputs()
    logits = module(source, mask, target)
    padding = torch.where(mask == 0, source + 1, source) % 16_000
    assert not torch.equal(padding, source)
    torch.testing.assert_close(module(padding, mask, target), logits, rtol=0, atol=1e-4)
    source = source.clone()
    source[:, 3] = (source[:, 3] + 1) % 16_000
    assert (module(source, mask, target) - logits).abs().amax(dim=(1, 2)).min() > 1e-3
    later = target.clone()
    later[:, -1] = (later[:, -1] + 1) % 16_000
    changed = module(padding, mask, later)
    torch.testing.assert_close(changed[:, :-1], logits[:, :-1], rtol=0, atol=1e-4)


@torch.no_grad()
def test_lstm_reads_both_directions() -> None:
    model = models.load("lstm")
    module, (ids,) = model.build(), model.example_inputs()
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 10_000
    difference = (module(changed) - module(ids)).abs().amax(dim=(0, 2))
    assert difference[0] > 1e-3
    assert difference[8] > 1e-3


@torch.no_grad()
def test_rotary_scores_depend_on_distance_only() -> None:
    cos, sin = rope_tables(32, 16)
    q, k = torch.randn(16), torch.randn(16)
    rows = rotate(q.expand(32, 16), cos, sin) @ rotate(k.expand(32, 16), cos, sin).T
    for distance in (0, 3, 11):
        diagonal = rows.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert (rows[:, 0] - rows[0, 0]).abs().max() > 0.1


@torch.no_grad()
def test_grouped_attention_equals_repeated_keys_and_values() -> None:
    grouped, full = RotaryAttention(32, 4, 2), RotaryAttention(32, 4)
    full.q.weight, full.out.weight = grouped.q.weight, grouped.out.weight
    for name in ("k", "v"):
        weight = getattr(grouped, name).weight.unflatten(0, (2, 8))
        getattr(full, name).weight.copy_(weight.repeat_interleave(2, dim=0).flatten(0, 1))
    x, tables = torch.randn(2, 10, 32), rope_tables(10, 8)
    torch.testing.assert_close(grouped(x, *tables), full(x, *tables), rtol=0, atol=1e-5)


@torch.no_grad()
def test_both_ways_to_run_experts_agree_until_one_overflows() -> None:
    with seeded(3):
        dense = _moe.DenseExperts()
        gather = _moe.GatherExperts()
        x = torch.randn(2, 64, _moe.WIDTH)
    gather.load_state_dict(dense.state_dict())
    torch.testing.assert_close(gather(x), dense(x), rtol=0, atol=1e-5)
    # Equal tokens all choose the same two experts: half of them exceed the capacity.
    same = x[:1, :1].expand(2, 64, -1)
    overflow, wanted = gather(same), dense(same)
    right = (overflow - wanted).abs().amax(dim=-1) < 1e-5
    assert right.sum() == 64


@torch.no_grad()
def test_experts_share_one_unit_over_two_of_eight() -> None:
    shares = _moe.DenseExperts().shares(torch.randn(50, _moe.WIDTH))
    assert ((shares > 0).sum(1) == 2).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(50))


def test_moe_models_share_weights_and_agree() -> None:
    model, gather = models.load("moe"), models.load("moe-gather")
    (ids,) = model.example_inputs()
    with torch.no_grad():
        torch.testing.assert_close(gather.build()(ids), model.build()(ids), rtol=0, atol=1e-4)


@torch.no_grad()
def test_settled_batch_norms_keep_activations_at_scale() -> None:
    with seeded(5):
        images = torch.randn(8, 3, 16, 16)
        network = nn.Sequential(*(ConvNorm(a, 16, 3) for a in (3, 16, 16, 16, 16)))
        settled = settle(network, images)
    for block in settled:
        norm = block[1]
        images = block(images)
        assert 0.3 < images.std() < 2
        assert (norm.running_var - 1).abs().max() > 0.05
        assert norm.weight.std() > 0.05
        assert norm.momentum == 0.1
    assert not settled.training
