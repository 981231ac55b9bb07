"""Which layers of a result are slower than they were, timed in both whole models."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from mopt.children import run_child
from mopt.cost import ModelCost
from mopt.disk import scratch
from mopt.errors import MoptError
from mopt.json_files import parse_json
from mopt.npz_files import write_npz

# Found by name, as cost models are: the core imports none.
_CHILD = "mopt.cost_models.profile_child"
_ROUNDS = 2
_SECONDS = 0.6
_TIMEOUT = 120.0
# A layer counts as slower from this factor on, if that is this share of the model's time.
_FACTOR, _SHARE = 1.15, 0.01


def slower_layers(
    before: tuple[Path, ModelCost], after: tuple[Path, ModelCost], inputs: Mapping[str, object],
    threads: int | None,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """By layer path, the ms before and after of layers that take clearly longer than they did.

    Both are the path of an ONNX file and what is executed for it. Each side runs in fresh processes
    in turn; of each layer the least counts. Layers that one side runs no operator for are left out;
    {} where operators cannot be told apart.
    """
    least: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for _ in range(_ROUNDS):
        for (model, cost), found in zip((before, after), least, strict=True):
            times = _layer_times(model, cost, inputs, threads)
            for path, ms in times.items():
                found[path] = min(ms, found.get(path, ms))
    was, now = least
    total = sum(was.values())
    return {
        path: (was[path], ms)
        for path, ms in now.items()
        if path in was and ms > _FACTOR * was[path] and ms - was[path] > _SHARE * total
    }


def _layer_times(
    model: Path, cost: ModelCost, inputs: Mapping[str, object], threads: int | None
) -> dict[str, float]:
    with scratch("mopt-profile") as folder:
        arrays, job = Path(folder) / "inputs.npz", Path(folder) / "job.json"
        write_npz(arrays, dict(inputs))  # type: ignore[arg-type]
        job.write_text(json.dumps({
            "model": str(model), "inputs": str(arrays), "threads": threads or 0,
            "seconds": _SECONDS,
        }))  # fmt: skip
        command = [sys.executable, "-P", "-m", _CHILD, str(job)]
        try:
            child = run_child(command, label="timing layers", timeout=_TIMEOUT)
        except MoptError:
            # A result is not lost because its layers cannot be timed one by one.
            return {}
    timed = parse_json(child.stdout.strip(), name="the timing process")
    if [name for name, _ in timed] != [node.name for node in cost.nodes]:
        return {}
    found: dict[str, float] = {}
    for node, (_, ms) in zip(cost.nodes, timed, strict=True):
        if node.work.path:
            found[node.work.path] = found.get(node.work.path, 0.0) + float(ms)
    return found
