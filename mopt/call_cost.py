"""Seconds and workspace of single calls: measured on this machine, or estimated from shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from mopt.allocations import record_allocations
from mopt.cost import Work, cost_model
from mopt.device import find_device
from mopt.flops import node_flops, shape_of, size_hint

# An ordinary CPU core; plans depend on the ratios only.
_FLOPS_PER_SECOND = 5e10
_BYTES_PER_SECOND = 1e10
_CALL_SECONDS = 3e-6
# Calls longer than this are timed once.
_LONG_SECONDS = 0.02


def estimate(node: fx.Node) -> tuple[float, int]:
    """Seconds by operations and bytes on an ordinary core; no workspace is known."""
    moved = sum(
        tensor.dtype.itemsize * _count(tensor)
        for value in (node, *node.all_input_nodes)
        for tensor in pytree.tree_leaves(value.meta.get("val"))
        if isinstance(tensor, Tensor)
    )
    seconds = max(node_flops(node) / _FLOPS_PER_SECOND, moved / _BYTES_PER_SECOND)
    return seconds + _CALL_SECONDS, 0


def priced_by(device: str) -> Callable[[fx.Node], tuple[float, int]]:
    """Prices of calls on a device, by its cost model; no workspace is known."""
    model = cost_model(find_device(device))

    def price(node: fx.Node) -> tuple[float, int]:
        return model.cost(_work(node)).milliseconds / 1e3, 0

    return price


def _work(node: fx.Node) -> Work:
    """What a call of a joint graph computes and moves."""
    values = [
        [t for t in pytree.tree_leaves(v.meta.get("val")) if isinstance(t, Tensor)]
        for v in (*node.all_input_nodes, node)
    ]
    moved = sum(t.dtype.itemsize * _count(t) for some in values for t in some)
    written = sum(_count(t) for t in values[-1])
    name = str(node.target)
    sources = [shape_of(t) for some in values[:-1] for t in some]
    dtype = next((t.dtype for some in reversed(values) for t in some), torch.float32)
    form = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    flops = float(node_flops(node))
    if any(f"aten.{n}." in name for n in ("mm", "addmm", "bmm", "baddbmm")) and len(sources) > 1:
        left, right = sources[-2:]
        rows = _count(values[-1][0]) // max(1, right[-1])
        shape = (1, rows, right[-1], left[-1])
        return Work("matmul", flops, 0.0, moved, form, node.name, rows, shape, name)
    kinds = {
        "convolution": "convolution", "attention": "attention", "norm": "norm",
        "softmax": "softmax", "pool": "pool", "sum": "reduce", "mean": "reduce",
        "embedding": "move", "clone": "move", "copy": "move", "cat": "move",
    }  # fmt: skip
    kind = next((k for part, k in kinds.items() if part in name), "pointwise")
    return Work(kind, flops, 0.0, moved, form, node.name, 1, (written,), name)


def _count(tensor: Tensor) -> int:
    total = 1
    for size in shape_of(tensor):
        total *= size
    return total


@dataclass
class Measured:
    """Runs one call of each kind (operator, shapes, strides, other arguments) on zeros.

    The first argument that is on a GPU decides where memory is looked at. A call that cannot be run
    alone is estimated; ``failed`` lists those.
    """

    repetitions: int = 3
    known: dict[Hashable, tuple[float, int]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def __call__(self, node: fx.Node) -> tuple[float, int]:
        key = _key(node)
        if key not in self.known:
            self.known[key] = self._measure(node)
        return self.known[key]

    def _measure(self, node: fx.Node) -> tuple[float, int]:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return estimate(node)
        # Joint graphs are planned while dynamo still makes every new tensor a fake one.
        with (
            _disable_current_modes(),
            torch.no_grad(),
            torch.random.fork_rng(devices=_devices(node)),
        ):
            try:
                args, kwargs = _arguments(node)
                return _run(target, args, kwargs, self.repetitions)
            # What operators raise for zeros where they expect certain values (a place, a length).
            except (RuntimeError, IndexError, TypeError, ValueError):
                self.failed.append(node.name)
                return estimate(node)


def _devices(node: fx.Node) -> list[int]:
    found = {
        tensor.device.index or 0
        for source in (node, *node.all_input_nodes)
        for tensor in pytree.tree_leaves(source.meta.get("val"))
        if isinstance(tensor, Tensor) and tensor.device.type == "cuda"
    }
    return sorted(found)


def _key(node: fx.Node) -> Hashable:
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    return (str(node.target), str(spec), tuple(map(_leaf_key, leaves)))


def _leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, fx.Node):
        return _value_key(leaf.meta.get("val"))
    return repr(leaf)


def _value_key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        stride = tuple(size_hint(s) for s in value.stride())
        return (shape_of(value), stride, str(value.dtype), str(value.device))
    if isinstance(value, torch.SymInt):
        return size_hint(value)
    return str(value)


def _arguments(node: fx.Node) -> tuple[Any, Any]:
    cache: dict[fx.Node, Any] = {}

    def real(source: fx.Node) -> Any:
        if source not in cache:
            cache[source] = pytree.tree_map(_real, source.meta["val"])
        return cache[source]

    found: tuple[Any, Any] = fx.map_arg((node.args, node.kwargs), real)  # type: ignore[assignment]
    return found


def _real(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return size_hint(value)
    if not isinstance(value, Tensor):
        return value
    shape = shape_of(value)
    stride = tuple(size_hint(s) for s in value.stride())
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else 0
    base = torch.zeros(reach, dtype=value.dtype, device=value.device)
    return base.as_strided(shape, stride)


def _run(target: Any, args: Any, kwargs: Any, repetitions: int) -> tuple[float, int]:
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    gpu = next((t.device for t in tensors if t.device.type == "cuda"), None)
    if gpu is not None:
        target(*args, **kwargs)
        torch.cuda.synchronize(gpu)
        before = torch.cuda.memory_allocated(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        value = target(*args, **kwargs)
        most = torch.cuda.max_memory_allocated(gpu) - before
        workspace = most - (torch.cuda.memory_allocated(gpu) - before)
    else:
        with record_allocations() as found:
            value = target(*args, **kwargs)
        workspace = found.total.peak - found.total.kept
    best = float("inf")
    del value
    for _ in range(repetitions):
        started = time.perf_counter()
        target(*args, **kwargs)
        if gpu is not None:
            torch.cuda.synchronize(gpu)
        best = min(best, time.perf_counter() - started)
        if best > _LONG_SECONDS:
            break
    return best, max(0, workspace)
