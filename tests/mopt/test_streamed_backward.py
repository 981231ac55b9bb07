"""Backward in pieces of the sequence: gradients of the whole, in less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopt.allocations import record_allocations
from mopt.errors import CaptureError
from mopt.models._blocks import Decoder, SwiGLU
from mopt.models.gpt_12x768 import Block
from mopt.streamed_backward import stream_blocks


def test_gradients_are_those_of_the_whole_sequence() -> None:
    torch.manual_seed(0)
    # Rotary positions are made of the number of rows alone.
    model = Decoder(
        vocabulary=50, context=64, width=32, layers=2, heads=4, feed_forward=lambda: SwiGLU(32, 64)
    )
    plain = copy.deepcopy(model)
    streamed = stream_blocks(model, torch.randint(50, (2, 12)), pieces=3)
    assert len(streamed) == 2
    # Other lengths than the example's, in pieces that do not divide them.
    ids = torch.randint(50, (2, 31))
    for run in (plain, model):
        F.cross_entropy(run(ids).flatten(0, 1), ids.flatten()).backward()
    for (name, one), two in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None, name
        torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-6)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for block in streamed:
        del block.forward
    assert torch.equal(model(ids), plain(ids))


def test_a_block_keeps_its_input_and_works_in_pieces() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(32, 4))
    x = torch.randn(1, 512, 32, requires_grad=True)

    def peak() -> int:
        with record_allocations() as seen:
            model(x).sum().backward()
        return seen.total.peak

    plain = peak()
    stream_blocks(model, torch.randn(1, 16, 32), blocks=[model[0]], pieces=16)
    assert peak() < 0.7 * plain


class Mean(nn.Module):
    """Rows meet in a mean over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x - x.mean(1, keepdim=True))


class Scores(nn.Module):
    """Attention without a mask."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("block", "code"),
    [
        (Mean(), "stream-mixes-rows"), (Scores(), "stream-mixes-rows"),
        (nn.Dropout(0.5).train(), "stream-random"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_relates_rows_otherwise_is_refused(block: nn.Module, code: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), block)
    with pytest.raises(CaptureError) as caught:
        stream_blocks(model, torch.randn(2, 12, 8), blocks=[block])
    assert caught.value.code == code
