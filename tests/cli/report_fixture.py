"""Reports and memory plans made for tests of what is drawn from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def side(size: int, milliseconds: float | None) -> dict[str, Any]:
    return {
        "size_bytes": size,
        "peak_bytes": {"measured": 4 * size, "estimated": None},
        "latency_ms": {"measured": milliseconds, "estimated": 4.0},
    }


def layer(path: str, index: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "path": path, "kind": "linear", "shape": [64, 64 + index], "flops": 1000 + index,
        "format": "int8" if index % 2 else "int4-g32", "source": f"net.py:{index + 1}",
        "bytes_before": 4 * 64 * (64 + index), "bytes_after": 64 * (64 + index),
        **changes,
    }  # fmt: skip


def candidates(many: int = 3) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"format": name, "size_bytes": 1000 * i, "latency_ms": 0.25 * i, "loss": 0.001 / i,
         "latency_source": "estimated", "loss_source": "exact"}
        for i, name in enumerate([f"int{8 + i}" for i in range(many)], 1)
    ]  # fmt: skip
    return [*found, {"format": "sparse", "reason": "no kernel on cpu"}]


def step(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "numerics": "lossy", "skipped": [], **changes}


def report(layers: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    data = {
        "schema": 1, "mopt": "0.1.0", "model": "char-lm", "recipe": "int8-dynamic",
        "recipe_toml": 'name = "int8-dynamic"\n', "target": "host", "backend": "onnx", "seed": 3,
        "budget": ["size<=3MB"],
        "baseline": side(16_810_000, 4.12), "result": side(2_940_000, 2.05),
        "speed": {"ratio": 0.5, "ratio_low": 0.48, "ratio_high": 0.52, "confidence": 0.99,
                  "pairs": 20, "eager_ms": None},
        "quality": {"metric": "accuracy", "higher_is_better": True, "baseline": 0.99,
                    "result": 0.98, "batches": 3, "cosine": 0.9995, "sqnr_db": 38.2},
        "coverage": {"parameters": 0.9, "flops": 0.8, "outside": [
            {"path": "head", "reason": "data-dependent branch", "source": "net.py:41"}]},
        "layers": [layer("a.first"), layer("b.second", 1)] if layers is None else layers,
        "steps": [{"name": "quantize-dynamic", "numerics": "lossy", "changed": True,
                   "seconds": 1.5, "bytes_before": 100, "bytes_after": 50,
                   "stats": {"weight_error": {"a.first": 0.01}, "zeros_of": {"b.second": 0.5}},
                   "skipped": [{"site": "c.third", "reason": "960 weights are too few"}]}],
        "environment": {"python": "3.12", "torch": "2.13", "machine": {
            "cpu": "a processor", "cores": 2, "isa": ["avx2"], "memory_bytes": 2**33}},
    }  # fmt: skip
    return {**data, **changes}


def plan() -> dict[str, Any]:
    """Three buffers; the most is alive at step 1."""
    rows = [("x", 0, 2, 4096, 0), ("y", 1, 3, 8192, 4096), ("z", 2, 4, 2048, 0)]
    return {
        "schema": 1, "peak_bytes": 12288, "lower_bound_bytes": 12288, "input_order_bytes": 14336,
        "steps": [{"node": name, "call": "out"} for name in ("relu", "linear", "add", "sum")],
        "buffers": [
            {"id": name, "lower": lower, "upper": upper, "bytes": size, "where": "arena",
             "offset": offset, "shares": None}
            for name, lower, upper, size, offset in rows
        ],
    }  # fmt: skip


def training() -> dict[str, Any]:
    """The plan of a training step of four layers."""
    rows = [
        {"layer": f"blocks.{i}", "kept_bytes": 4096 * i, "squeezed_bytes": 2048, "dropped_bytes":
         8192 - 2048 * i, "offloaded_bytes": 1024 * (i % 2), "repeated_calls": i,
         "repeated_seconds": 0.001 * i}
        for i in range(4)
    ]  # fmt: skip
    live = [4096, 8192, 12288, 9000, 4000]
    return {
        "model": "char-lm", "optimizer": "adamw", "budget": 16384, "peak": 12288,
        "plain_peak": 20000, "peak_bound": 11000, "repeated_seconds": 0.006, "step_seconds": 0.1,
        "layers": rows, "plain_timeline": [8192, 16000, 20000, 9000],
        "timeline": [{"call": "linear", "layer": "blocks.0", "kind": "forward", "bytes": size}
                     for size in live],
    }  # fmt: skip


def write_artifact(
    folder: Path, data: dict[str, Any] | None = None, memory: dict[str, Any] | None = None
) -> str:
    """A folder with a report, and what else reports are drawn from."""
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report() if data is None else data))
    if memory is not None:
        (folder / "plan.json").write_text(json.dumps(memory))
    return str(folder)
