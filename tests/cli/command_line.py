"""What tests of the command line share: a small model in a file, results, processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NET = """
import torch
from torch import nn
from torch.export import Dim

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(256, 64)
        self.second = nn.Linear(64, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

def batch(seed):
    return (torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)),)

def factory():
    torch.manual_seed(0)
    return {
        "model": Net(),
        "example_inputs": batch(0),
        "dynamic_shapes": {"x": {0: Dim("batch")}},
        "calibration": lambda: (batch(i) for i in range(3)),
    }

def evaluate(run):
    return {"metric": "score", "value": 0.5, "higher_is_better": True}
"""


@dataclass(frozen=True)
class Result:
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout as the one JSON document it must be."""
        return json.loads(self.out)


Call = Callable[..., Result]


def start(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
    """A command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from mopt.cli.main import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )
