"""What reads strangers' files, with sound files to start from: for fuzzing and its seeds in tests.

``check`` gives one input to one parser and says whether it was read or refused. Anything but an
answer or a ``MoptError`` comes out as it is: those are the findings.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mopt.errors import MoptError
from tests.cli import report_fixture

Parse = Callable[[bytes, Path], object]
Made = tuple[Sequence[bytes], Parse]


@dataclass(frozen=True)
class Parser:
    """``parse(data, scratch)`` may write in ``scratch`` only; ``seeds`` are inputs it accepts."""

    name: str
    seeds: tuple[bytes, ...]
    parse: Parse


def check(parser: Parser, data: bytes, scratch: Path) -> bool:
    """Whether the parser read the input (True) or refused it with an error of mopt (False)."""
    try:
        parser.parse(data, scratch)
    except MoptError as error:
        assert error.code and error.message
        return False
    return True


def make_parser(name: str, scratch: Path) -> Parser:
    """One parser; what it reads may be made below ``scratch`` first."""
    seeds, parse = _MAKERS[name](scratch)
    return Parser(name, tuple(seeds), parse)


def _bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def _artifact(scratch: Path) -> Made:
    """The manifest of a whole artifact, whose files stay as they are."""
    import torch

    import mopt
    from mopt.lowering import lower, read_manifest

    folder = scratch / "artifact"
    program = mopt.capture(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
    lower(program, "eager").save(folder)

    def parse(data: bytes, _: Path) -> object:
        (folder / "manifest.json").write_bytes(data)
        return read_manifest(folder)

    return ((folder / "manifest.json").read_bytes(),), parse


def _report(scratch: Path) -> Made:
    from mopt.cli.diff import _layers, _rows
    from mopt.cli.report import render

    def parse(data: bytes, scratch: Path) -> object:
        (scratch / "report.json").write_bytes(data)
        (scratch / "plan.json").unlink(missing_ok=True)
        document = json.loads(render(scratch, "json"))
        _rows(document, document), _layers(document, document)
        return [render(scratch, form) for form in ("html", "md", "trace")]

    rows = [report_fixture.layer("a", option="int8", candidates=report_fixture.candidates())]
    choice = {"choice": {"binding": ["size"], "minimize": "loss", "estimated": {"loss": 0.1}},
              "rounds": [{"measured": {"size": 4, "loss": 0.1}, "estimated": {"loss": 0.2}}],
              "front": [{"size": 3, "loss": 0.4, "budget": "size<=3"}]}  # fmt: skip
    seeds = (_bytes(report_fixture.report()), _bytes(report_fixture.report(rows, **choice)))
    return seeds, parse


def _plan(scratch: Path) -> Made:
    from mopt.cli.report import render

    report = _bytes(report_fixture.report())

    def parse(data: bytes, scratch: Path) -> object:
        (scratch / "report.json").write_bytes(report)
        (scratch / "plan.json").write_bytes(data)
        return [render(scratch, form) for form in ("html", "trace")]

    return (_bytes(report_fixture.plan()),), parse


def _layout(scratch: Path) -> Made:
    """The memory plan that the eager backend keeps while it runs."""
    import torch

    import mopt
    from mopt.backends.eager.plan_file import read_layout
    from mopt.json_files import parse_json
    from mopt.lowering import lower
    from mopt.pass_base import PassContext
    from mopt.recipe import Recipe

    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    program = mopt.capture(net, (torch.ones(1, 3),))
    context = PassContext(backend="eager")
    planned = mopt.Pipeline(Recipe.load("least-memory").passes()).run(program, context)
    folder = lower(planned, "eager").save(scratch / "planned")

    def parse(data: bytes, _: Path) -> object:
        return read_layout(parse_json(data, name="plan.json"))

    return ((folder / "plan.json").read_bytes(),), parse


def _graph(scratch: Path) -> Made:
    """The graph of an eager artifact, run when it was read."""
    import torch

    import mopt
    from mopt.backends.eager.graph_file import read_graph, write_graph
    from mopt.json_files import parse_json

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x).softmax(-1)
            return torch.cat([y[:, :2], y.transpose(0, 1)[:2].reshape(-1, 2)])

    data, weights = write_graph(mopt.capture(Net(), (torch.ones(4, 4),)))

    def parse(raw: bytes, _: Path) -> object:
        return read_graph(parse_json(raw, name="graph.json"), weights)

    return (_bytes(data),), parse


def _recipe(scratch: Path) -> Made:
    from mopt.recipe import Recipe, preset_files

    def parse(data: bytes, _: Path) -> object:
        return Recipe.from_toml(data, source="recipe.toml").passes()

    return tuple(path.read_bytes() for path in preset_files().values()), parse


def _device(scratch: Path) -> Made:
    from mopt.device import _shipped
    from mopt.device_file import parse_device

    seeds = tuple(path.read_bytes() for path in _shipped().values())
    return seeds, lambda data, _: parse_device(data)


def _budget(scratch: Path) -> Made:
    from mopt.budget import Budget

    seeds = (b"size<=3MB", b"quality>=0.99x", b"latency<=0.5x", b"memory<=64MiB",
             b"minimize=latency", b"latency <= 2.5 ms")  # fmt: skip
    return seeds, lambda data, _: Budget.parse(data.decode("utf-8", "replace").split("\n"))


def _config(scratch: Path) -> Made:
    from mopt.gate_config import read_config

    seed = b"""
[defaults]
target = "host"
budget = ["quality>=0.99"]

[models.net]
model = "net.py:factory"
recipe = "int8-dynamic"
seed = 3

[check]
baseline = "mopt-baseline.json"
fail-on = "error"

[check.limits]
size = { increase = "1 %" }
coverage = { level = "warn", decrease = "0.5 pt" }

[check.limits.net]
latency-measured = { level = "off" }
"""

    def parse(data: bytes, scratch: Path) -> object:
        (scratch / "mopt.toml").write_bytes(data)
        return read_config(scratch / "mopt.toml")

    return (seed,), parse


def _baseline(scratch: Path) -> Made:
    from mopt.gate import baseline_data, changed_formats, compare, entry_of, read_baseline, updated
    from mopt.json_files import parse_json

    now = entry_of(report_fixture.report())

    def parse(data: bytes, _: Path) -> object:
        models = read_baseline(parse_json(data, name="baseline"), "baseline")
        for name, entry in models.items():
            rows = compare(name, entry, now)
            updated(entry, now, rows), changed_formats(entry, now)
        return models

    return (_bytes(baseline_data({"net": now}, "0.1")),), parse


def _csv(scratch: Path) -> Made:
    from mopt.memory_csv import parse_buffers

    seeds = (b"id,lower,upper,size\na,0,3,64\nb,1,2,128\n",
             b"buffer,start,end,size,alignment,gaps,hint,offset\nx,0,9,64,8,2-4 5-7@0:8,,16\n"
             b"y,1,2,128,1,,3,\n")  # fmt: skip
    return seeds, lambda data, _: parse_buffers(data)


def _safetensors(scratch: Path) -> Made:
    from mopt.disk import FileWriter
    from mopt.safetensors_files import read_numpy, read_torch, write_safetensors

    tensors = {"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(4, np.int8),
               "flag": np.array([True, False])}  # fmt: skip
    with FileWriter(str(scratch / "w.safetensors"), "w") as writer:
        write_safetensors(writer, tensors, {"format": "pt"})

    def parse(data: bytes, place: Path) -> object:
        (place / "w.safetensors").write_bytes(data)
        arrays = read_numpy(place / "w.safetensors")
        return [a.sum() for a in arrays.values()], read_torch(place / "w.safetensors")

    return ((scratch / "w.safetensors").read_bytes(),), parse


def _npz(scratch: Path) -> Made:
    from mopt.npz_files import read_npz

    plain, packed = io.BytesIO(), io.BytesIO()
    np.savez(plain, x=np.ones((2, 3), np.float32), y=np.arange(4))
    np.savez_compressed(packed, x=np.zeros(1000, np.float32), y=np.array(3))

    def parse(data: bytes, scratch: Path) -> object:
        (scratch / "x.npz").write_bytes(data)
        return read_npz(scratch / "x.npz")

    return (plain.getvalue(), packed.getvalue()), parse


def _npy(scratch: Path) -> Made:
    from mopt.npz_files import read_npy

    made = io.BytesIO()
    np.save(made, np.ones((2, 3), np.float32))

    def parse(data: bytes, scratch: Path) -> object:
        (scratch / "x.npy").write_bytes(data)
        return read_npy(scratch / "x.npy")

    return (made.getvalue(),), parse


def _onnx(scratch: Path) -> Made:
    from tests.backends.onnx import hostile

    nodes = [hostile.node("Shape", "x", "s"), hostile.node("Gather", "s i", "n"),
             hostile.node("ConstantOfShape", "n", "c"), hostile.node("Add", "x c")]  # fmt: skip
    shaped = hostile.model(nodes, {"i": np.array([0], np.int64)})
    seeds = (hostile.GOOD.SerializeToString(), shaped.SerializeToString())
    return seeds, lambda data, scratch: hostile.check(scratch, data)


def _kernels(scratch: Path) -> Made:
    from mopt.backends.triton.kernel_file import read_binary, read_kernels
    from mopt.safe_read import Folder

    entry = {"name": "k", "architecture": "sm_90", "file": "k-0.cubin", "order": ["x"],
             "types": ["*fp32"], "aligned": ["x"], "registers": 32, "shared": 0, "spills": 0,
             "scratch": 0, "warps": 4, "threads": 128, "stages": 2,
             "constants": {"BLOCK": "32"}}  # fmt: skip
    data = {"schema": 1, "triton": "3.4", "target": "sm_90", "lowered": [], "left": [],
            "pytorch": [], "share": 0.5, "checked": {}, "rejected": [], "measured": {},
            "values": {},
            "tables": {"sm_90": {"key": []}}, "binaries": {"sm_90": {"key": entry}}}  # fmt: skip

    def parse(raw: bytes, scratch: Path) -> object:
        (scratch / "kernels.json").write_bytes(raw)
        (scratch / "k-0.cubin").write_bytes(b"binary")
        with Folder(scratch) as folder:
            stored = read_kernels(folder)
            return [read_binary(folder, one) for by in stored.binaries.values()
                    for one in by.values()]  # fmt: skip

    return (_bytes(data),), parse


def _cache(scratch: Path) -> Made:
    """A record of the cache: whatever it holds, it is read or missed, never an error."""
    import tempfile

    from mopt.cache import Cache

    with tempfile.TemporaryDirectory() as folder:
        Cache(folder).put("loss", {"weight": "a"}, {"value": 1.5})
        seed = next(Path(folder).rglob("*.json")).read_bytes()

    def parse(data: bytes, scratch: Path) -> object:
        cache = Cache(scratch)
        cache.put("loss", {"weight": "a"}, {"value": 1.5})
        path = next((scratch / "loss-v1").glob("*.json"))
        path.write_bytes(data)
        value = cache.get("loss", {"weight": "a"})
        assert value in (None, {"value": 1.5})
        return value

    return (seed,), parse


def _signature(scratch: Path) -> Made:
    """The signature in a manifest: inputs are arranged by it."""
    import torch

    import mopt
    from mopt.json_files import parse_json
    from mopt.program_signature import signature_of
    from mopt.signature import Signature

    program = mopt.capture(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
    seed = _bytes(signature_of(program).as_json())

    def parse(data: bytes, _: Path) -> object:
        signature = Signature.from_json(parse_json(data, name="signature"))
        return signature.as_json()

    return (seed,), parse


_MAKERS: dict[str, Callable[[Path], Made]] = {
    "manifest": _artifact, "report": _report, "layout": _layout, "plan": _plan, "graph": _graph,
    "recipe": _recipe, "device": _device, "budget": _budget, "config": _config,
    "baseline": _baseline, "csv": _csv, "safetensors": _safetensors, "npz": _npz, "npy": _npy,
    "onnx": _onnx, "kernels": _kernels, "cache": _cache, "signature": _signature,
}  # fmt: skip
NAMES = tuple(_MAKERS)
