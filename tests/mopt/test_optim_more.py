"""Optimizers of other packages: state as announced, one optimizer to the outside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mopt
from mopt.errors import InputError, UsageError
from mopt.optim_more import MuonAdamW, low_bit_adamw
from mopt.optimizer_state import state_bytes


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(10, 32), nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32), nn.Linear(32, 10)
    )


def test_muon_gets_hidden_matrices_and_adamw_the_rest() -> None:
    model = net()
    optimizer = MuonAdamW(model, 1e-2)
    muon = [p for g in optimizer.param_groups if g["kind"] == 0 for p in g["params"]]
    assert [tuple(p.shape) for p in muon] == [(64, 32), (32, 64)]
    rest = sum(p.numel() for p in model.parameters()) - 2 * 64 * 32
    assert optimizer.state_bytes() == 4 * 2 * 64 * 32 + 8 * rest
    ids, target = torch.randint(10, (64,)), torch.randint(10, (64,))
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(ids), target)
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    held = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    assert held == optimizer.state_bytes()
    # Its state goes into a checkpoint and back.
    other = copy.deepcopy(model)
    again = MuonAdamW(other, 1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, by in ((model, optimizer), (other, again)):
        F.cross_entropy(one(ids), target).backward()
        by.step()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_muon_needs_a_hidden_matrix() -> None:
    with pytest.raises(InputError, match="no hidden matrix"):
        MuonAdamW(nn.Sequential(nn.Embedding(4, 4)))


def test_states_of_few_bits_count_in_the_budget() -> None:
    with pytest.raises(InputError, match="bits is 3"):
        low_bit_adamw(net().parameters(), bits=3)
    try:
        import torchao  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match="torchao"):
            low_bit_adamw(net().parameters())
        return
    model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 16))
    for bits, share in ((8, 0.27), (4, 0.15)):
        optimizer = low_bit_adamw(model.parameters(), bits=bits)
        small = 8 * (128 + 16 + 128 * 16)
        assert state_bytes(optimizer) - small < share * 8 * 64 * 128
        batch = (torch.randn(8, 64), torch.randint(16, (8,)))
        step = mopt.fit(model, F.cross_entropy, batch, optimizer=optimizer, costs="estimated")
        assert step.plans[0].kinds["other"] == state_bytes(optimizer)
