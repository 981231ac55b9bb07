"""What the order of nodes in an ONNX file does to the memory that ONNX Runtime really takes.

    python -m benchmarks.memory_onnx [--models fan,cells,unet2d] [--repeat 3] [--write]

Every model is lowered twice, as written and with its calls in the planned order, and run in fresh
processes with ONNX Runtime's own order of nodes and with its order by priority, which keeps that of
the file as long as no optimizer makes new nodes. The figure is the largest growth of private memory
during the first run after loading, the median of the repeated processes. ``fan`` and ``cells`` are
made here: eight large results, each reduced to a small one; and a stack of cells with branches of
several widths, as architecture search finds them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from mopt.backends.onnx.options import SESSION_CONFIG
from mopt.bench_loop import PeakMemory
from mopt.driver import BASELINE
from mopt.frontend import capture
from mopt.lowering import lower
from mopt.models import load
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.recipe import Recipe
from mopt.registry import make_pass

RESULTS = Path(__file__).parent / "results"
MODELS = ("fan", "cells", "unet2d", "bert", "encoder-decoder", "mobilenet-v2", "moe")
ORDERS = {"own": ort.ExecutionOrder.DEFAULT, "priority": ort.ExecutionOrder.PRIORITY_BASED}


class Fan(nn.Module):
    """Large results first, small ones of them after: the order as written keeps all large ones."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, columns] to [rows]."""
        large = [(x + k).sin() @ x.T for k in range(8)]
        return torch.stack([part.tanh().mean(1) for part in large]).sum(0)


class Cells(nn.Module):
    """Cells whose branches widen and narrow; all of a cell are opened before any of them closes."""

    def __init__(self, cells: int = 4, channels: int = 16) -> None:
        super().__init__()
        widths = (2, 4, 8, 3)
        self.wide = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(channels, w * channels, 3, padding=1) for w in widths)
            for _ in range(cells)
        )
        self.narrow = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(w * channels, channels, 1) for w in widths)
            for _ in range(cells)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, channels, height, width] to the same."""
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            opened = [torch.tanh(conv(x)) for conv in wide]
            for conv, branch in zip(narrow, opened, strict=True):
                x = x + conv(branch)
        return x


def main() -> None:
    """Measure, print a line a model, and write the results where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "ORDER", "ARENA"))
    options = parser.parse_args()
    if options.child:
        print(_child(Path(options.child[0]), options.child[1], options.child[2] == "on"))
        return
    torch.set_num_threads(1)
    path = RESULTS / "memory-onnx.json"
    stored = json.loads(path.read_text())["models"] if options.write and path.exists() else []
    rows = {row["model"]: row for row in stored}
    for name in options.models.split(","):
        rows[name] = _measure(name, options.repeat)
        print(json.dumps(rows[name]), flush=True)
        if options.write:
            data = {
                "command": "python -m benchmarks.memory_onnx", "date": time.strftime("%Y-%m-%d"),
                "onnxruntime": ort.__version__, "models": list(rows.values()),
            }  # fmt: skip
            path.write_text(json.dumps(data, indent=2) + "\n")


def _program(name: str) -> Program:
    if name == "fan":
        module, inputs = Fan().eval(), (torch.zeros(1024, 1024),)
    elif name == "cells":
        module, inputs = Cells().eval(), (torch.zeros(1, 16, 128, 128),)
    else:
        entry = load(name)
        module, inputs = entry.build(), tuple(entry.example_inputs())
    return Pipeline(Recipe.load(BASELINE).passes()).run(capture(module, inputs, None))


def _measure(name: str, repeat: int) -> dict[str, Any]:
    program = _program(name)
    planned = Pipeline([make_pass("plan-memory", {"for_device": True})]).run(program)
    plan = planned.plan["memory"]
    row: dict[str, Any] = {
        "model": name, "moved": plan["order_from"] != "input",
        "planned_bytes": plan["peak_bytes"], "input_order_bytes": plan["input_order_bytes"],
        "growth_bytes": {},
    }  # fmt: skip
    for kind, which in (("as written", program), ("planned", planned)):
        with tempfile.TemporaryDirectory() as place:
            lower(which, "onnx").save(Path(place) / "out")
            flat = program.flat_inputs(program.args, program.kwargs)
            arrays = {f"i{k}": value.numpy() for k, value in enumerate(flat)}
            np.savez(Path(place) / "inputs.npz", **arrays)
            for order in ORDERS:
                for arena in ("on", "off"):
                    command = [sys.executable, "-m", "benchmarks.memory_onnx", "--child", place,
                               order, arena]  # fmt: skip
                    grown = [int(subprocess.run(command, check=True, capture_output=True).stdout)
                             for _ in range(repeat)]  # fmt: skip
                    label = f"{kind}, {order} order, arena {arena}"
                    row["growth_bytes"][label] = int(statistics.median(grown))
    return row


def _child(place: Path, order: str, arena: bool) -> int:
    """Growth of private memory during the first run after loading."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.execution_order = ORDERS[order]
    options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(
        str(place / "out" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    with np.load(place / "inputs.npz") as file:
        arrays = [file[key] for key in file.files]
    feed = {port.name: value for port, value in zip(session.get_inputs(), arrays, strict=True)}
    with PeakMemory() as memory:
        kept = session.run(None, feed)
    del kept
    return memory.peak


if __name__ == "__main__":
    main()
