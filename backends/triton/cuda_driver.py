"""Loads stored binaries and launches them through the CUDA driver, without a compiler.

A binary is taken only for the very launch it was compiled for: same types, constants and
alignments. Everything else is left to the caller.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mopt.backends.triton.aot import Binary
from mopt.backends.triton.launch import ALIGNMENT, Launch
from mopt.errors import LoweringError

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PLAIN_SHARED = 49_152  # what a block may take without asking
_C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class StoredRunner:
    """Launches from an artifact's binaries; modules are loaded when they are first needed."""

    def __init__(self, binaries: Mapping[str, Binary]) -> None:
        self._binaries = binaries
        self._driver = ctypes.CDLL("libcuda.so.1")
        # Kept for good: a captured graph may launch them at any time.
        self._functions: dict[str, ctypes.c_void_p] = {}

    def run(self, launch: Launch) -> bool:
        """Run a launch on the current stream; False where no binary is for it."""
        key = launch.key()
        binary = self._binaries.get(key)
        if binary is None or binary.scratch or not _is_aligned(launch):
            return False
        if 0 in launch.grid:  # the driver takes no empty grid
            return True
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self._load(binary)
        values: list[Any] = []
        for name, kind in zip(binary.order, binary.types, strict=True):
            value = launch.arguments[name]
            if isinstance(value, Tensor):
                values.append(ctypes.c_void_p(value.data_ptr()))
            else:
                values.append(_C_TYPES[kind](value))
        # Triton's kernels end with two pointers to scratch memory, which ours do not use.
        values += [ctypes.c_void_p(0), ctypes.c_void_p(0)]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values)
        )
        grid = (*launch.grid, 1, 1, 1)[:3]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            self._driver.cuLaunchKernel(
                function, *map(ctypes.c_uint, grid), ctypes.c_uint(binary.threads),
                ctypes.c_uint(1), ctypes.c_uint(1), ctypes.c_uint(binary.shared), stream, pointers,
                None,
            ),
            binary,
        )  # fmt: skip
        return True

    def _load(self, binary: Binary) -> ctypes.c_void_p:
        torch.cuda.current_stream().synchronize()  # makes sure that a context exists
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), binary.code), binary)
        name = binary.name.encode()
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), module, name), binary)
        if binary.shared > _PLAIN_SHARED:
            self._check(
                self._driver.cuFuncSetAttribute(
                    function, ctypes.c_int(_MAX_DYNAMIC_SHARED), ctypes.c_int(binary.shared)
                ),
                binary,
            )
        return function

    def _check(self, status: int, binary: Binary) -> None:
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._driver.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text))
        raise LoweringError(
            f"the CUDA driver refuses {binary.name} for {binary.architecture}: "
            f"{(text.value or b'?').decode()}",
            code="no-binary-for-gpu",
            hint="load without trust=True: kernels are then compiled for this GPU",
        )


def _is_aligned(launch: Launch) -> bool:
    return all(
        value.data_ptr() % ALIGNMENT == 0
        for value in launch.arguments.values() if isinstance(value, Tensor)
    )  # fmt: skip
