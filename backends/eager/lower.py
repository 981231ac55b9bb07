"""The eager backend: an artifact that PyTorch runs node by node, the reference for all others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx

from mopt.backends.eager.graph_file import operator_name, read_graph, write_graph
from mopt.backends.eager.plan_file import PLAN, read_layout
from mopt.backends.eager.planned import PlannedGraph
from mopt.backends.eager.recorder import record_calls
from mopt.backends.eager.replay import replay
from mopt.backends.eager.streamed import StoredWeight, StreamedGraph
from mopt.errors import ArtifactError, UsageError
from mopt.json_files import json_bytes, parse_json
from mopt.pass_base import Skip
from mopt.program import Program, site_of
from mopt.safe_read import Folder, OpenFile
from mopt.safetensors_files import read_header, read_torch
from mopt.signature import Signature
from mopt.storages import CallFacts, StorageTrace

GRAPH = "graph.json"
WEIGHTS = "weights.safetensors"


class EagerRunner:
    """Runs a graph file in PyTorch."""

    def __init__(self, module: Callable[..., Any], threads: int | None) -> None:
        self._module: Callable[..., Any] | None = module
        self._threads = threads

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Output tensors for flat inputs (tensors or numpy arrays)."""
        assert self._module is not None, "the runner was closed"
        if self._threads:
            torch.set_num_threads(self._threads)
        with torch.no_grad():
            outputs = self._module(*[torch.as_tensor(value) for value in inputs])
        return [value for value in outputs if isinstance(value, torch.Tensor)]

    def close(self) -> None:
        """Drop the weights."""
        if isinstance(self._module, StreamedGraph):
            self._module.close()
        self._module = None


class EagerBackend:
    """Graph as JSON, weights as safetensors."""

    name = "eager"

    def unsupported(self, program: Program) -> list[Skip]:
        """Calls whose operator may not stand in a graph file."""
        return [
            Skip(site_of(node), f"operator {node.target} cannot be written to a graph file")
            for node in program.graph.nodes
            if node.op == "call_function" and operator_name(node.target) is None
        ]

    def lower(self, program: Program, folder: Path, signature: Signature) -> list[str]:
        """Write ``graph.json`` and ``weights.safetensors``, and ``plan.json`` if there is a plan.

        A plan is replayed before it is written. Raises LoweringError ``stale-plan`` for one of
        another graph, ``memory-plan-missed`` where the run needs more, ``planned-output``.
        """
        graph, weights = write_graph(program)
        plan = program.plan.get("memory")
        graph["planned"] = plan is not None and plan["backend"] == self.name
        (folder / GRAPH).write_bytes(json_bytes(graph, indent=None))
        save_file(weights, folder / WEIGHTS)
        if plan is None or not graph["planned"]:
            return [GRAPH, WEIGHTS]
        measured = replay(program, plan)
        (folder / PLAN).write_bytes(json_bytes({**plan, "measured_bytes": measured}))
        return [GRAPH, WEIGHTS, PLAN]

    def record_calls(self, program: Program) -> tuple[StorageTrace, dict[str, CallFacts]]:
        """What a memory planner has to know: a run on the example inputs, call by call."""
        return record_calls(program)

    def open(
        self, folder: Path, signature: Signature, *, threads: int | None,
        resident: float | None = None,
    ) -> EagerRunner:  # fmt: skip
        """Load a graph file and its weights.

        ``resident`` is the share of the weights' bytes that may be in memory at once: the rest
        stays on disk and is read when it is needed, in every run. Such a runner keeps no plan.
        Raises UsageError (``resident-too-small``, ``bad-resident``).
        """
        with Folder(folder) as opened:
            data = _read_json(opened, GRAPH)
            with opened.open_file(WEIGHTS) as file:
                if resident is not None:
                    return _open_streamed(data, file, resident, threads)
                # Kernels pick their code path by alignment, which a mapped file does not have:
                # copies make the loaded model equal to the captured one bit for bit.
                weights = {name: tensor.clone() for name, tensor in read_torch(file).items()}
            # A file that only lies beside the graph is not trusted.
            planned = isinstance(data, dict) and data.get("planned") is True
            plan = _read_json(opened, PLAN) if planned else None
        module = read_graph(data, weights)
        del weights
        if plan is None:
            return EagerRunner(module, threads)
        names = {node: node.meta["name"] for node in module.graph.nodes}
        graph = PlannedGraph(module, read_layout(plan), names, consume=True)
        return EagerRunner(graph, threads)

    def read_module(self, folder: Path) -> fx.GraphModule:
        """The graph of a lowered model with its weights, for backends that build on it."""
        with Folder(folder) as opened:
            data = _read_json(opened, GRAPH)
            with opened.open_file(WEIGHTS) as file:
                weights = {name: tensor.clone() for name, tensor in read_torch(file).items()}
        return read_graph(data, weights)

    def bench_command(self, folder: Path, inputs: Path, *, threads: int | None) -> list[str]:
        """Time the graph in a fresh process."""
        return [
            sys.executable, "-m", "mopt.backends.eager.bench", str(folder), str(inputs),
            str(threads or 0),
        ]  # fmt: skip


def _read_json(folder: Folder, name: str) -> Any:
    with folder.open_file(name) as file:
        return parse_json(file.read(), name=name, error=ArtifactError,
                          max_bytes=64 << 20, max_values=20_000_000)  # fmt: skip


def _open_streamed(data: Any, file: OpenFile, resident: float, threads: int | None) -> EagerRunner:
    if not 0 < resident <= 1:
        raise UsageError(
            f"resident is {resident!r}, expected a share of the weights above 0 and up to 1",
            code="bad-resident",
        )
    mapped, header = read_torch(file), read_header(file)
    module = read_graph(data, mapped, as_stored=True)
    stored = {
        node: StoredWeight(
            header.tensors[node.meta["stored"]], mapped[node.meta["stored"]].dtype,
            node.meta.get("requires_grad", False), node.meta["channels_last"],
            module.get_buffer(str(node.target)),
        )
        for node in module.graph.nodes if node.op == "get_attr"
    }  # fmt: skip
    total = sum(info.stop - info.start for info in header.tensors.values())
    graph = StreamedGraph(module.graph, stored, header, os.dup(file.fd), int(resident * total))
    return EagerRunner(graph, threads)


BACKEND = EagerBackend()
