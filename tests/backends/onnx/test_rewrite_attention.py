"""Attention in its many spellings reaches the intended kernel with equal numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.backends.onnx.exported import dynamic, export

# Float32 softmax and sums in another order.
TOLERANCE = 2e-6
WIDTH, HEADS = 32, 4


class Projections(nn.Module):
    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = WIDTH // HEADS
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, kv_heads * self.head)
        self.v = nn.Linear(WIDTH, kv_heads * self.head)
        self.out = nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> list[Tensor]:
        return [
            layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        ]

    def merge(self, mixed: Tensor) -> Tensor:
        return self.out(mixed.transpose(1, 2).flatten(2))


class Masked(Projections):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        allowed = mask.bool()[:, None, None, :]
        q, k, v = self.split(x)
        x = x + self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))
        q, k, v = self.split(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))


def rows(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, WIDTH)


def mask(batch: int, length: int) -> Tensor:
    hidden = torch.ones(batch, length, dtype=torch.int64)
    hidden[-1, length // 2 :] = 0
    return hidden


SHAPES = dynamic({0: "batch", 1: "length"}, largest=63)
MASKED_SHAPES = dynamic({0: "batch", 1: "length"}, {0: "batch", 1: "length"})


def test_masked_encoder_is_flat_attention_with_one_mask() -> None:
    result = export(Masked(), (rows(2, 6), mask(2, 6)), MASKED_SHAPES)
    operators = result.operators()
    assert operators["Attention"] == 2
    assert operators["Transpose"] == operators["Reshape"] == 0
    assert operators["Where"] == operators["Expand"] == 1
    assert result.kernels()["Attention"] == 2
    for batch, length in ((2, 6), (1, 3), (3, 17)):
        assert result.error(rows(batch, length), mask(batch, length)) < TOLERANCE


def test_padding_that_hides_a_whole_row_stays_finite() -> None:
    result = export(Masked(), (rows(2, 6), mask(2, 6)), MASKED_SHAPES)
    (y,) = result.run(rows(2, 6), torch.zeros(2, 6, dtype=torch.int64))
    assert bool(torch.isfinite(torch.from_numpy(y)).all())


class Stacked(nn.Module):
    """One layer for queries, keys and values, separated by a permutation, as in a ViT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)


def test_stacked_projection_is_split_once() -> None:
    result = export(Stacked(), (rows(2, 6),), dynamic({0: "batch"}))
    assert result.operators() == {"MatMul": 1, "Add": 1, "Split": 1, "Attention": 1}
    assert result.error(rows(3, 6)) < TOLERANCE


class Causal(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.merge(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=len(k[0]) != HEADS)
        )


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
def test_causal_attention_is_grouped_query_attention(kv_heads: int) -> None:
    result = export(Causal(kv_heads), (rows(2, 6),), SHAPES)
    operators = result.operators()
    assert operators["GroupQueryAttention"] == 1
    assert operators["Attention"] == operators["Transpose"] == 0
    for batch, length in ((2, 6), (1, 1), (3, 40)):
        assert result.error(rows(batch, length)) < TOLERANCE


class Narrow(nn.Module):
    """Heads of 6 numbers, which the grouped kernel refuses."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (-1, 6)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


def test_head_sizes_the_causal_kernel_refuses_keep_attention() -> None:
    result = export(Narrow(), (torch.randn(2, 6, 24),), SHAPES)
    assert result.operators() == {"Attention": 1}
    assert result.error(torch.randn(3, 11, 24)) < TOLERANCE


def test_causal_attention_does_not_ask_for_a_cache() -> None:
    result = export(Causal(), (rows(2, 6),), SHAPES)
    node = next(n for n in result.model.graph if n.op_type == "GroupQueryAttention")
    assert len(node.outputs) == 1


class Rotary(Projections):
    def __init__(self, *, equal_halves: bool = True) -> None:
        super().__init__(kv_heads=2)
        angles = torch.arange(64.0)[:, None] * 0.5 ** torch.arange(self.head // 2)
        second = angles if equal_halves else angles * 2
        both = torch.cat((angles, second), -1)
        self.register_buffer("cos", both.cos())
        self.register_buffer("sin", both.sin())

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        q, k = self.rotate(q), self.rotate(k)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def test_rotary_embedding_works_on_flat_heads() -> None:
    result = export(Rotary(), (rows(2, 6),), SHAPES)
    operators = result.operators()
    assert operators["RotaryEmbedding"] == 2
    assert operators["Transpose"] == operators["Neg"] == 0
    assert result.error(rows(1, 33)) < TOLERANCE


def test_tables_with_unequal_halves_are_left_alone() -> None:
    result = export(Rotary(equal_halves=False), (rows(2, 6),), SHAPES)
    assert result.operators()["RotaryEmbedding"] == 0
    assert result.error(rows(1, 33)) < TOLERANCE


class Written(Projections):
    """Products and softmax written out, with an additive mask."""

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head)
        scores = scores + (1.0 - hidden[:, None, None, :].to(x.dtype)) * -1e30
        return self.merge(scores.softmax(-1) @ v)


def test_attention_written_out_is_recognized() -> None:
    result = export(Written(), (rows(2, 6), mask(2, 6)), MASKED_SHAPES)
    assert result.operators()["Attention"] == 1
    assert result.operators()["Softmax"] == 0
    assert result.error(rows(3, 9), mask(3, 9)) < TOLERANCE


class Filled(Projections):
    """A causal mask filled in before the softmax, as small language models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tril(torch.ones(64, 64)))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.split(x)
        scores = (q @ k.transpose(-2, -1)) * self.head**-0.5
        hidden = self.seen[:length, :length] == 0
        return self.merge(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v)


def test_filled_masks_are_recognized() -> None:
    result = export(Filled(), (rows(2, 6),), SHAPES)
    assert result.operators()["Softmax"] == 0
    assert result.error(rows(3, 9)) < TOLERANCE


class Positions(Projections):
    """A causal mask from compared positions, with padding, and keys repeated for grouped heads."""

    def __init__(self, *, window: int | None = None) -> None:
        super().__init__(kv_heads=2)
        self.window = window

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = self.split(x)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        place = torch.arange(x.shape[1])
        allowed = place[None, :] <= place[:, None]
        if self.window is not None:
            allowed = place[None, :] <= place[:, None] + self.window
        allowed = allowed[None, None] & hidden.bool()[:, None, None, :]
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))


def test_compared_positions_and_padding_reach_the_causal_kernel() -> None:
    result = export(Positions(), (rows(2, 6), mask(2, 6)), MASKED_SHAPES)
    assert result.operators()["GroupQueryAttention"] == 1
    assert result.error(rows(2, 6), mask(2, 6)) < TOLERANCE
    assert result.error(rows(3, 19), mask(3, 19)) < TOLERANCE


def test_masks_that_show_some_of_the_future_are_not_causal() -> None:
    result = export(Positions(window=2), (rows(2, 6), mask(2, 6)), MASKED_SHAPES)
    assert result.operators()["GroupQueryAttention"] == 0
    assert result.error(rows(3, 19), mask(3, 19)) < TOLERANCE


class Cross(Projections):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, _, _ = self.split(x)
        _, k, v = self.split(memory)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_causal_attention_over_another_length_keeps_its_meaning() -> None:
    shapes = dynamic({0: "batch", 1: "length"}, {0: "batch", 1: "memory"})
    result = export(Cross(), (rows(2, 6), rows(2, 9)), shapes)
    assert result.operators()["GroupQueryAttention"] == 0
    assert result.error(rows(2, 5), rows(2, 11)) < TOLERANCE
