"""Plans for several devices, and the written program run by two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mopt.device import find_device
from mopt.errors import BudgetNotMet, InputError
from mopt.sharding_plan import link_speed, plan_sharding, script

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

def factory():
    return {"model": Net(), "example_inputs": (torch.randn(4, 32),)}
"""


class Wide(nn.Module):
    """Eight blocks of 1 MiB of weights and few activations."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x


def test_the_stage_is_the_fastest_that_fits() -> None:
    model, x = Wide(), (torch.randn(16, 512),)
    weights = 8 << 20
    h100 = find_device("h100")
    assert link_speed(h100) == 450e9

    def plan(memory: int, count: int = 8) -> object:
        return plan_sharding(
            model, x, devices=count, device=h100, memory=memory, state_bytes=2 * weights,
            seconds=0.2,
        )  # fmt: skip

    ample, tight, least = plan(40 << 20), plan(16 << 20), plan(9 << 20)
    # Weights, gradients and two states; sharded states; sharded weights too.
    assert [p.chosen.stage for p in (ample, tight, least)] == [0, 2, 3]
    assert least.chosen.resharded and not tight.chosen.resharded
    assert set(least.failed) == {0, 2}
    assert least.chosen.peak_bytes <= 9 << 20
    # Ring collectives: stage 3 sends half as much again as the others.
    assert least.chosen.sent_bytes == pytest.approx(3 * 7 / 8 * weights, rel=0.01)
    assert tight.chosen.sent_bytes == ample.chosen.sent_bytes
    assert ample.blocks[0] == "blocks.0"
    with pytest.raises(BudgetNotMet):
        plan(3 << 20)
    with pytest.raises(InputError, match="devices is 0"):
        plan(40 << 20, 0)


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    torch.manual_seed(0)
    spaces: dict[str, object] = {}
    exec(NET, spaces)
    given = spaces["factory"]()
    found = plan_sharding(
        given["model"], given["example_inputs"], devices=2, device=find_device("h100"),
        memory=1 << 30, seconds=0.2, link=1e9,
    )  # fmt: skip
    sharded = next(c for c in (found.chosen, *found.others) if c.stage == 3)

    (tmp_path / "train.py").write_text(
        script(replace(found, chosen=sharded), "net.py:factory", "mean-square")
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, "train.py", "--check"], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [one.communicate(timeout=240)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert float(said[0].split("gradient: ")[1]) < 1e-5
