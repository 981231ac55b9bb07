"""mopt beside ONNX Runtime's own quantizers and torch.compile, on the same models, in one run.

    python benchmarks/inference.py [--models bert,vit,...] [--batches 1,16] [--rounds 7]

Every candidate runs in fresh processes, one sample each in turn, in an order drawn anew every
round; the table gives medians over rounds and their spread. Ratios are within the run. Results go
to ``benchmarks/results/inference-<machine>.json`` and as Markdown to standard output.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

import mopt
from mopt import models
from mopt.backends.onnx.lower import MODEL
from mopt.backends.onnx.options import SESSION_CONFIG
from mopt.calibration import Calibration
from mopt.inputs import resized
from mopt.lowering import lower
from mopt.machine import machine_fingerprint
from mopt.npz_files import write_npz
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program_signature import signature_of
from mopt.quality import drift
from mopt.recipe import Recipe

MODELS = ("bert", "vit", "resnet50", "gpt-12x768", "llama-mini", "digits-cnn", "pydoc-gpt")
RECIPES = ("none", "int8-dynamic", "int8-static", "int8-weight", "int4-weight", "fp16-weight")
# What each recipe of mopt is compared with.
COUNTERPARTS = {
    "none": ("torch.compile", "plain export"),
    "int8-dynamic": ("ORT dynamic per tensor", "ORT dynamic per channel"),
    "int8-static": ("ORT static",),
    "int4-weight": ("ORT MatMulNBits int4",),
    "int8-weight": ("ORT MatMulNBits int8",),
}


@dataclass
class Candidate:
    """One row: a command that prints one timing sample, and what is known of the model."""

    name: str
    commands: dict[int, list[str]] = field(default_factory=dict)
    size_bytes: int = 0
    outputs: list[np.ndarray] = field(default_factory=list)
    samples: dict[int, list[float]] = field(default_factory=dict)
    error: str = ""


def main() -> None:
    """Build, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", default="*", help="globs (a,b); ORT rows need plain export")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="benchmarks/results/inference.json")
    options = parser.parse_args()
    batches = [int(b) for b in options.batches.split(",")]
    results: dict[str, Any] = {}
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = run_model(name, batches, options, Path(scratch))
        print(markdown(name, results[name], batches), flush=True)
    document = {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_fingerprint(),
        "mopt": mopt.__version__,
        "torch": torch.__version__,
        "results": results,
    }
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def run_model(
    name: str, batches: list[int], options: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """The wanted candidates of one model."""
    entry = models.load(name)
    module = entry.build()
    dynamic = entry.dynamic_shapes() if entry.dynamic_shapes else None
    program = mopt.capture(module, entry.example_inputs(), dynamic)
    calibration = list(entry.calibration()) if entry.calibration else [entry.example_inputs()]
    inputs = {}
    for batch in batches:
        found = resized(program, batch)
        if found is None:
            continue
        args, kwargs = found
        flat = signature_of(program).flatten(args, kwargs)
        path = scratch / f"inputs-{batch}.npz"
        names = [spec.name for spec in signature_of(program).inputs]
        write_npz(path, {n: t.numpy() for n, t in zip(names, flat, strict=True)})
        inputs[batch] = path
    reference = [t.numpy() for t in program.run_flat(*program.args, **program.kwargs)]
    candidates: list[Candidate] = []
    for build in builders(name, program, calibration, scratch, inputs, options.threads):
        if not any(fnmatch(getattr(build, "label", ""), glob) for glob in options.rows.split(",")):
            continue
        try:
            candidates.append(build())
        except Exception as error:  # a peer may fail in any way: that is a result
            label = getattr(build, "label", "?")
            candidates.append(Candidate(label, error=f"{type(error).__name__}: {error}"[:200]))
    take_samples([c for c in candidates if not c.error], list(inputs), options.rounds)
    rows = {}
    for candidate in candidates:
        row: dict[str, Any] = {"error": candidate.error, "size_bytes": candidate.size_bytes}
        if candidate.outputs:
            pairs = zip(reference, candidate.outputs, strict=True)
            kept = [(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs]
            row["drift"] = drift([a for a, _ in kept], [b for _, b in kept]).as_json()
        row["latency_ms"] = {
            str(batch): {"median": statistics.median(values), "low": min(values),
                         "high": max(values), "samples": len(values)}
            for batch, values in candidate.samples.items()
        }  # fmt: skip
        rows[candidate.name] = row
    return rows


def builders(
    name: str,
    program: mopt.Program,
    calibration: list[Any],
    scratch: Path,
    inputs: dict[int, Path],
    threads: int,
) -> Iterator[Callable[[], Candidate]]:
    """Functions that each make one candidate."""

    def labelled(label: str, build: Callable[[], Candidate]) -> Callable[[], Candidate]:
        build.label = label  # type: ignore[attr-defined]
        return build

    def onnx_candidate(label: str, folder: Path) -> Candidate:
        files = [p for p in folder.iterdir() if p.name.startswith("model.onnx")]
        found = Candidate(label, size_bytes=sum(p.stat().st_size for p in files))
        config = SESSION_CONFIG if label.startswith("mopt") else {}
        arrays = [t.numpy() for t in signature_of(program).flatten(program.args, program.kwargs)]
        session = ort.InferenceSession(folder / MODEL, session_options(config, threads))
        names = [value.name for value in session.get_inputs()]
        found.outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        for batch, path in inputs.items():
            found.commands[batch] = [
                sys.executable, "-c", _ORT_CHILD, str(folder / MODEL), str(path), str(threads),
                json.dumps(config),
            ]  # fmt: skip
        return found

    plain = scratch / "plain"
    for eager in ("torch eager", "torch.compile"):
        yield labelled(eager, lambda eager=eager: torch_candidate(eager, name, inputs, threads))
    yield labelled(
        "plain export", lambda: onnx_candidate("plain export", plain_export(program, plain))
    )
    for recipe in RECIPES:

        def build(recipe: str = recipe) -> Candidate:
            context = PassContext(calibration=Calibration(calibration, program))
            compressed = Pipeline(Recipe.load(recipe).passes()).run(program, context)
            folder = lower(compressed, "onnx").save(scratch / recipe)
            return onnx_candidate(f"mopt {recipe}", folder)

        yield labelled(f"mopt {recipe}", build)
    for peer, make in PEERS.items():

        def build_peer(peer: str = peer, make: Any = make) -> Candidate:
            folder = scratch / peer.replace(" ", "-")
            folder.mkdir()
            make(for_peers(plain / MODEL), folder / MODEL, program, calibration)
            return onnx_candidate(peer, folder)

        yield labelled(peer, build_peer)


def plain_export(program: mopt.Program, folder: Path) -> Path:
    """What PyTorch's exporter gives on its own."""
    folder.mkdir(exist_ok=True)
    names = [spec.name for spec in signature_of(program).inputs]
    exported = torch.export.export(
        program.graph_module, *resized(program, 2) if program.dynamic_shapes
        else (program.args, program.kwargs), dynamic_shapes=program.dynamic_shapes, strict=False,
    )  # fmt: skip
    torch.onnx.export(exported, dynamo=True, input_names=names, verbose=False).save(
        str(folder / MODEL)
    )
    return folder


def for_peers(source: Path) -> Path:
    """The plain export without its stored shapes, on which ONNX Runtime's quantizers stumble."""
    import onnx

    target = source.with_name("for-peers.onnx")
    if not target.exists():
        model = onnx.load(source)
        del model.graph.value_info[:]
        onnx.save(model, target)
    return target


def _dynamic(per_channel: bool) -> Callable[..., None]:
    def make(source: Path, target: Path, program: Any, calibration: Any) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            source, target, per_channel=per_channel, weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": 1},
        )  # fmt: skip

    return make


def _static(source: Path, target: Path, program: Any, calibration: Any) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    names = [spec.name for spec in signature_of(program).inputs]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration[:16])

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            if batch is None:
                return None
            return {n: t.numpy() for n, t in zip(names, batch, strict=True)}

    quantize_static(source, target, Reader(), per_channel=True,
                    extra_options={"DefaultTensorType": 1})  # fmt: skip


def _nbits(bits: int) -> Callable[..., None]:
    def make(source: Path, target: Path, program: Any, calibration: Any) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            onnx.load(source), block_size=32, is_symmetric=True, accuracy_level=4, bits=bits
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(target), use_external_data_format=False)

    return make


PEERS: dict[str, Callable[..., None]] = {
    "ORT dynamic per tensor": _dynamic(False),
    "ORT dynamic per channel": _dynamic(True),
    "ORT static": _static,
    "ORT MatMulNBits int4": _nbits(4),
    "ORT MatMulNBits int8": _nbits(8),
}


def session_options(config: dict[str, str], threads: int) -> ort.SessionOptions:
    """ONNX Runtime's defaults, with the entries that mopt sets for its own models."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return options


# The same loop for mopt's models and for its peers'; only the session's options differ.
_ORT_CHILD = """
import json, sys
import onnxruntime as ort
from mopt.bench_loop import run_bench
from mopt.npz_files import read_npz
model, path, threads, config = sys.argv[1:]
inputs = read_npz(path)
def load():
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.log_severity_level = 3
    for key, value in json.loads(config).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(model, options)
    return lambda: session.run(None, inputs)
print(run_bench(load))
"""

_TORCH_CHILD = """
import sys, torch
from mopt import models
from mopt.bench_loop import run_bench
from mopt.npz_files import read_npz
kind, name, path, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
inputs = [torch.as_tensor(v) for v in read_npz(path).values()]
def load():
    module = models.load(name).build()
    run = torch.compile(module) if kind == "torch.compile" else module
    def call():
        with torch.no_grad():
            return run(*inputs)
    call()
    return call
print(run_bench(load))
"""


def torch_candidate(kind: str, name: str, inputs: dict[int, Path], threads: int) -> Candidate:
    """The user's module in PyTorch, eager or through Inductor."""
    found = Candidate(kind)
    for batch, path in inputs.items():
        found.commands[batch] = [
            sys.executable, "-c", _TORCH_CHILD, kind, name, str(path), str(threads),
        ]  # fmt: skip
    return found


def take_samples(candidates: list[Candidate], batches: list[int], rounds: int) -> None:
    """One sample of everything a round, in a fresh order every round."""
    order = random.Random(0)
    for _ in range(rounds):
        todo = [(c, b) for c in candidates for b in batches if b in c.commands]
        order.shuffle(todo)
        for candidate, batch in todo:
            done = subprocess.run(candidate.commands[batch], capture_output=True, text=True)
            if done.returncode:
                candidate.error = done.stderr.strip().splitlines()[-1][:200]
                candidate.commands.pop(batch)
                continue
            sample = json.loads(done.stdout.strip().splitlines()[-1])
            candidate.samples.setdefault(batch, []).append(sample["median_ms"])


def markdown(name: str, rows: dict[str, Any], batches: list[int]) -> str:
    """The rows of one model as a Markdown table."""
    lines = [
        f"\n### {name}\n",
        "| candidate | size, MB | "
        + " | ".join(f"batch {b}, ms (low to high)" for b in batches)
        + " | cosine | SQNR, dB |",
        "|---" * (4 + len(batches)) + "|",
    ]
    for label, row in rows.items():
        if row["error"] and not row["latency_ms"]:
            lines.append(f"| {label} | failed: {row['error'][:90]} |" + " |" * (2 + len(batches)))
            continue
        cells = []
        for batch in batches:
            t = row["latency_ms"].get(str(batch))
            cells.append(f"{t['median']:.2f} ({t['low']:.2f} to {t['high']:.2f})" if t else "-")
        far = row.get("drift")
        size = f"{row['size_bytes'] / 1e6:.2f}" if row["size_bytes"] else "-"
        sqnr = "-" if not far else "equal" if far["sqnr_db"] is None else f"{far['sqnr_db']:.1f}"
        cosine = f"{far['cosine']:.5f}" if far else "-"
        lines.append(f"| {label} | {size} | {' | '.join(cells)} | {cosine} | {sqnr} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
