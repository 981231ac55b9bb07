"""Load and run a model once, with the runtime's profiler on and its own graph written out.

    python -m mopt.cost_models.executed_run JOB.json

What is left in the folder is read by ``mopt.cost_models.executed``. Imports no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mopt.bench_loop import die_with_parent
from mopt.children import run_child
from mopt.cost_models.runtime import runtime_errors, session_options
from mopt.errors import ArtifactError, InputError
from mopt.json_files import parse_json, read_json
from mopt.machine import trim_heap
from mopt.npz_files import read_npz, write_npz

GRAPH = "executed.onnx"
_TIMEOUT = 600.0
_EVENTS = "events.json"
# From here on the runtime's copies of the weights are worth a process of their own.
_APART_BYTES = 1 << 28
_TYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64",
    "tensor(bool)": "bool", "tensor(int64)": "int64", "tensor(int32)": "int32",
    "tensor(int8)": "int8", "tensor(uint8)": "uint8", "tensor(int16)": "int16",
    "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
}  # fmt: skip


@dataclass(frozen=True)
class ExecutedRun:
    """Events of the profiler, and bytes of inputs and outputs; the graph is in the folder."""

    events: list[dict[str, Any]]
    input_bytes: list[float]
    output_bytes: list[float]


def run_once(
    model: Path, folder: Path, inputs: Mapping[str, np.ndarray] | None, sizes: Mapping[str, int]
) -> ExecutedRun:
    """Run ``model`` in this process, or a large one in another; ``GRAPH`` is left in ``folder``.

    Raises ArtifactError ``onnx-load-failed`` or InputError ``onnx-run-failed``.
    """
    weights = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))
    if weights < _APART_BYTES:
        return _run(model, folder, inputs, sizes)
    job = folder / "job.json"
    arrays = folder / "inputs.npz"
    if inputs is not None:
        write_npz(arrays, dict(inputs))
    job.write_text(json.dumps({
        "model": str(model.resolve()), "folder": str(folder), "sizes": dict(sizes),
        "inputs": None if inputs is None else str(arrays),
    }))  # fmt: skip
    command = [sys.executable, "-P", "-m", "mopt.cost_models.executed_run", str(job)]
    child = run_child(command, label=f"running {model.name}", timeout=_TIMEOUT)
    answer = parse_json(child.stdout.strip(), name="the process that ran the model")
    if "code" in answer:
        raise _error(model, answer["code"], answer["why"])
    events = json.loads((folder / _EVENTS).read_bytes())
    return ExecutedRun(events, answer["input_bytes"], answer["output_bytes"])


def main(job_path: str) -> int:
    """The process: runs the model of a job, prints sizes or what went wrong."""
    die_with_parent()
    job = read_json(job_path)
    folder = Path(job["folder"])
    inputs = None if job["inputs"] is None else read_npz(Path(job["inputs"]))
    try:
        found = _run(Path(job["model"]), folder, inputs, job["sizes"])
    except (ArtifactError, InputError) as error:
        print(json.dumps({"code": error.code, "why": str(error.__cause__)}))
        return 0
    (folder / _EVENTS).write_text(json.dumps(found.events))
    print(json.dumps(asdict(found) | {"events": None}))
    return 0


def _run(
    model: Path, folder: Path, inputs: Mapping[str, np.ndarray] | None, sizes: Mapping[str, int]
) -> ExecutedRun:
    import onnxruntime as ort

    options = session_options(threads=1)
    options.optimized_model_filepath = str(folder / GRAPH)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", "executed.data"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "64"),
    ):
        options.add_session_config_entry(key, value)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    try:
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except runtime_errors() as error:
        raise _error(model, "onnx-load-failed", str(error)) from error
    feed = _feed(session, inputs, sizes)
    try:
        outputs = session.run(None, feed)
    except runtime_errors() as error:
        raise _error(model, "onnx-run-failed", str(error)) from error
    events = json.loads(Path(session.end_profiling()).read_bytes())
    # The runtime's copies of the weights are gone; the heap they were on would stay.
    del session
    trim_heap()
    return ExecutedRun(
        events,
        [float(value.nbytes) for value in feed.values()],
        [float(np.asarray(value).nbytes) for value in outputs],
    )


def _error(model: Path, code: str, why: str) -> ArtifactError | InputError:
    first = why.splitlines()[0] if why else "it does not say why"
    if code == "onnx-load-failed":
        return ArtifactError(f"ONNX Runtime cannot load {model.name}: {first}", code=code)
    return InputError(
        f"the model does not run on these inputs: {first}", code=code,
        hint="give it inputs it can work with",
    )  # fmt: skip


def _feed(
    session: Any, inputs: Mapping[str, np.ndarray] | None, sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    if inputs is not None:
        return {port.name: inputs[port.name] for port in session.get_inputs()}
    feed = {}
    for port in session.get_inputs():
        shape = [d if isinstance(d, int) else int(sizes.get(d, 1)) for d in port.shape]
        feed[port.name] = np.zeros(shape, _TYPES[port.type])
    return feed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
