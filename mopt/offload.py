"""Values of a training step that lie in a file, or in pinned host memory, until backward.

Four functions stand in the graphs: ``put`` begins to move a value out, ``settle`` waits until it
is out, ``fetch`` begins to read it back into new memory, ``arrived`` waits for that. Between the
two of a pair other calls run. On a CPU one thread moves bytes to and from a file that has no name:
nothing stays behind, and a full disk is an error, which it would not be with a mapped file. On a
GPU a stream of its own copies to pinned memory.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mopt.errors import LimitError
from mopt.recompute import Link

# Smaller values are not worth a transfer.
LEAST = 64 << 10
_TRIAL = 32 << 20


class _Slot(np.ndarray[Any, np.dtype[np.int64]]):
    """The number of a place in the store; the place is free again once nobody holds the array."""


class _Store:
    """Places for values in one folder's file, and the thread that moves them in order."""

    def __init__(self, folder: str) -> None:
        self._file = tempfile.TemporaryFile(dir=folder or None)  # noqa: SIM115
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mopt-offload")
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self._writes: dict[int, tuple[Future[None], Tensor]] = {}
        self._reads: dict[int, tuple[Future[None], Tensor]] = {}

    def put(self, value: Tensor) -> Tensor:
        size = value.untyped_storage().nbytes()
        places = self._free.setdefault(size, [])
        if places:
            place = places.pop()
        else:
            place, self._end = self._end, self._end + size
        number = np.array([place]).view(_Slot)
        weakref.finalize(number, self._release, place, size)
        # The graph holds the value until it is settled; this holds it where the graph fails.
        self._writes[place] = (self._move(os.pwrite, value, place), value)
        return torch.from_numpy(number)

    def settle(self, handle: Tensor) -> None:
        self._writes.pop(int(handle))[0].result()

    def fetch(self, handle: Tensor, into: Tensor) -> None:
        self._reads[into.data_ptr()] = (self._move(os.preadv, into, int(handle)), into)

    def arrived(self, value: Tensor) -> None:
        self._reads.pop(value.data_ptr())[0].result()

    def _move(self, how: Any, value: Tensor, place: int) -> Future[None]:
        storage = value.untyped_storage()
        return self._thread.submit(self._all, how, storage.data_ptr(), storage.nbytes(), place)

    def _all(self, how: Any, address: int, size: int, place: int) -> None:
        memory = memoryview((ctypes.c_char * size).from_address(address))
        done = 0
        while done < size:
            part = memory[done:]
            given = [part] if how is os.preadv else part
            try:
                moved = how(self._file.fileno(), given, place + done)
            except OSError as error:
                raise LimitError(
                    f"a value of {size:,} bytes could not be moved out: {error.strerror}",
                    code="offload-failed",
                    hint="give another folder: offload='/path/on/a/larger/disk'",
                ) from error
            if moved == 0:
                raise LimitError(f"the file ends before byte {place + size}", code="offload-failed")
            done += moved

    def _release(self, place: int, size: int) -> None:
        waiting = self._writes.pop(place, None)
        if waiting is not None:
            waiting[0].exception()
        self._free[size].append(place)


class _Pinned:
    """Copies in pinned host memory, made by a stream of the device's own."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._kept: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._reads: dict[int, torch.cuda.Event] = {}
        self._next = 0

    def put(self, value: Tensor) -> Tensor:
        copy = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, pin_memory=True
        )  # fmt: skip
        self.stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(self.stream):
            copy.copy_(value, non_blocking=True)
            event = self.stream.record_event()
        self._next += 1
        number = np.array([self._next]).view(_Slot)
        weakref.finalize(number, self._kept.pop, self._next, None)
        self._kept[self._next] = (copy, event)
        return torch.from_numpy(number)

    def settle(self, handle: Tensor) -> None:
        torch.cuda.current_stream(self.stream.device).wait_event(self._kept[int(handle)][1])

    def fetch(self, handle: Tensor, into: Tensor) -> None:
        # The memory may still be in use by what runs before.
        self.stream.wait_stream(torch.cuda.current_stream(into.device))
        with torch.cuda.stream(self.stream):
            into.copy_(self._kept[int(handle)][0], non_blocking=True)
            self._reads[into.data_ptr()] = self.stream.record_event()

    def arrived(self, value: Tensor) -> None:
        event = self._reads.pop(value.data_ptr())
        torch.cuda.current_stream(self.stream.device).wait_event(event)


@cache
def _store(folder: str, device: torch.device) -> _Store | _Pinned:
    return _Pinned(device) if device.type == "cuda" else _Store(folder)


def put(value: Tensor, folder: str) -> Tensor:
    """Begin to move a value out; returns the number of its place, as a tensor."""
    return _store(folder, value.device).put(value)


def settle(handle: Tensor, value: Tensor, folder: str) -> Tensor:
    """Wait until the value is out and may be freed; returns the number of its place."""
    _store(folder, value.device).settle(handle)
    return handle


def fetch(
    handle: Tensor, folder: str, shape: list[int], stride: list[int], dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Begin to read a value back; only ``arrived`` says that the result may be used."""
    value = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    _store(folder, value.device).fetch(handle, value)
    return value


def arrived(value: Tensor, folder: str) -> Tensor:
    """Wait until a value that was fetched is there; returns it."""
    _store(folder, value.device).arrived(value)
    return value


@cache
def measure_link(folder: str, device: torch.device) -> Link:
    """Bytes a second out and back, of one large value through the store."""
    value = torch.zeros(_TRIAL, dtype=torch.uint8, device=device)
    best = [float("inf"), float("inf")]
    for _ in range(2):
        started = time.perf_counter()
        handle = settle(put(value, folder), value, folder)
        _wait(device)
        middle = time.perf_counter()
        arrived(fetch(handle, folder, [_TRIAL], [1], torch.uint8, device), folder)
        _wait(device)
        ended = time.perf_counter()
        best = [min(best[0], middle - started), min(best[1], ended - middle)]
    return Link(_TRIAL / best[0], _TRIAL / best[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def offer_offload(module: fx.GraphModule, nodes: Iterable[fx.Node], folder: str) -> int:
    """Write the moving out of each large value behind it; what no plan wants is dead code.

    Returns how many values are offered: those whose memory is wholly their own and of fixed size.
    """
    seen = {
        tensor.untyped_storage()._cdata
        for node in module.graph.nodes if node.op in ("placeholder", "get_attr")
        for tensor in [node.meta.get("val")] if isinstance(tensor, Tensor)
    }  # fmt: skip
    found = 0
    for node in nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not all(isinstance(n, int) for n in value.shape):
            continue
        storage = value.untyped_storage()
        whole = storage.nbytes() == value.numel() * value.dtype.itemsize
        if storage._cdata in seen or not whole or storage.nbytes() < LEAST:
            continue
        seen.add(storage._cdata)
        with module.graph.inserting_after(node):
            out = module.graph.call_function(put, (node, folder))
        with value.fake_mode:  # type: ignore[attr-defined]
            meta = torch.empty(1, dtype=torch.int64, device="cpu")
        out.meta = {
            key: node.meta[key] for key in ("nn_module_stack", "fwd_nn_module_stack")
            if key in node.meta
        } | {"val": meta, "partitioner_tag": "is_forward"}  # fmt: skip
        found += 1
    return found
