"""Runs a lowered graph: kernels on a GPU, in the interpreter, or the operators' references."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mopt.backends.triton.architectures import Architecture, running_architecture
from mopt.backends.triton.chains import compile_chains
from mopt.backends.triton.graphs import GraphReplay
from mopt.backends.triton.kernel import Problem
from mopt.backends.triton.kernel_file import StoredKernels, read_binary, read_kernels
from mopt.backends.triton.launch import Launch, Tile
from mopt.backends.triton.layers import StoredTiles
from mopt.backends.triton.rewrite import find_sites, kernels, replace
from mopt.backends.triton.values import restore_values
from mopt.errors import LoweringError
from mopt.safe_read import Folder

_log = logging.getLogger(__name__)


class ModuleRunner:
    """Runs a graph module on a device; inputs and outputs stay where the caller has them."""

    def __init__(self, module: fx.GraphModule, device: str, threads: int | None) -> None:
        self._module: Any = module
        self._device = torch.device(device)
        self._threads = threads
        self._call: Callable[[list[Tensor]], Sequence[Any]] = lambda inputs: self._module(*inputs)
        if self._device.type == "cuda":
            self._call = GraphReplay(self._call)

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Output tensors for flat inputs (tensors or numpy arrays)."""
        assert self._module is not None, "the runner was closed"
        if self._threads:
            torch.set_num_threads(self._threads)
        tensors = [torch.as_tensor(value) for value in inputs]
        moved = [tensor.to(self._device) for tensor in tensors]
        with torch.no_grad():
            outputs = [v for v in self._call(moved) if isinstance(v, Tensor)]
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return [value.cpu() for value in outputs]
        return outputs

    def close(self) -> None:
        """Drop the weights and what was captured."""
        self._module = None
        self._call = _closed


def _closed(inputs: list[Tensor]) -> Sequence[Any]:
    raise AssertionError("the runner was closed")


def open_runner(
    module: fx.GraphModule, folder: Folder, device: str, *, trust: bool, threads: int | None
) -> ModuleRunner:
    """The runner of an artifact on ``cpu``, ``interpreter`` or ``cuda``."""
    stored = read_kernels(folder)
    if device == "cpu":
        return ModuleRunner(module, "cpu", threads)
    restore_values(module, stored.values)
    layers = replace(module, find_sites(module)[0])
    if device == "interpreter":
        from mopt.backends.triton.interpreter import run_interpreted

        tiles = _tiles(stored, stored.target)
        for layer in layers:
            layer.bind(run_interpreted, tiles, always=True)
        return ModuleRunner(module, "cpu", threads)
    arch = _present()
    _to_device(module, torch.device("cuda"))
    run, tiles = _gpu_runner(stored, folder, arch, trust), _tiles(stored, arch.name)
    for layer in layers:
        layer.bind(run, tiles)
    compile_chains(module)
    return ModuleRunner(module, "cuda", threads)


def _tiles(stored: StoredKernels, arch: str) -> FallbackTiles:
    return FallbackTiles(stored.tables.get(arch) or stored.tables.get(stored.target) or {})


class FallbackTiles:
    """The artifact's tiles, and for a problem it does not know the first legal one of its kernel.

    Binaries exist only for what was compiled; such a call is compiled when it comes. ``unknown``
    lists it, and the log says so once.
    """

    def __init__(self, tables: Mapping[str, Mapping[int, Tile]]) -> None:
        self._known = StoredTiles(tables)
        self.unknown: dict[str, Problem] = {}

    def __call__(self, problem: Problem) -> Tile:
        """The tile for a problem."""
        try:
            return self._known(problem)
        except KeyError:
            if problem.text not in self.unknown:
                self.unknown[problem.text] = problem
                _log.warning("no binary and no tile were made beforehand for %s", problem.text)
            kernel = kernels()[problem.kernel]
            legal = [t for t in kernel.space(problem) if kernel.legal(t, problem) is None]
            return legal[0]


def _present() -> Architecture:
    if not torch.cuda.is_available():
        raise LoweringError(
            "PyTorch finds no GPU here",
            code="no-gpu",
            hint='mopt.load(folder) runs the same model on the CPU, device="interpreter" its '
            "kernels",
        )
    major, minor = torch.cuda.get_device_capability()
    arch = running_architecture(major, minor)
    if arch is None:
        raise LoweringError(
            f"the GPU has compute capability {major}.{minor}, for which no kernel was compiled",
            code="no-binary-for-gpu",
            hint="kernels are compiled for 8.0, 8.9 and 9.0 and run on later chips of the same "
            "generation; mopt.load(folder) runs the model on the CPU",
        )
    return arch


def _to_device(module: fx.GraphModule, device: torch.device) -> None:
    """Move weights, and the devices that the graph's own calls name."""
    module.to(device)

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in module.graph.nodes:
        node.args = torch.utils._pytree.tree_map_only(torch.device, moved, node.args)
        node.kwargs = torch.utils._pytree.tree_map_only(torch.device, moved, node.kwargs)
    module.recompile()


def _gpu_runner(stored: StoredKernels, folder: Folder, arch: Architecture, trust: bool) -> Any:
    from mopt.backends.triton.jit import JitRunner

    jit = JitRunner(arch)
    if not trust or arch.name not in stored.binaries:
        return jit
    from mopt.backends.triton.cuda_driver import StoredRunner

    binaries = {
        key: read_binary(folder, entry) for key, entry in stored.binaries[arch.name].items()
    }
    runner = StoredRunner(binaries)

    def run(launch: Launch) -> None:
        if not runner.run(launch):
            jit(launch)

    return run
