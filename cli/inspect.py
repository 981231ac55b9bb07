"""Show what is inside a model or an artifact, layer by layer.

TARGET is a MODEL as mopt compile takes it, or the folder of an artifact. Of a model its code is run
and it is captured; of an artifact only its manifest and report are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopt.cli._command import Command, option
from mopt.cli._output import Column, Output
from mopt.cli._progress import ConsoleProgress
from mopt.cli._stored_report import read_stored_report
from mopt.cli._summary import RESULT_COLUMNS, coverage_lines, result_rows
from mopt.cli._text import count, disk_size, plural
from mopt.cli._why import show_why
from mopt.errors import UsageError

if TYPE_CHECKING:
    from mopt.signature import TensorSpec


@click.command(cls=Command, help=__doc__)
@click.argument("target", metavar="TARGET")
@option("--inputs", metavar="FILE.npz", help="Example inputs of a model.")
@click.option("--trust", is_flag=True, help="Load a .pt2, which runs code from the file.")
@option("--why", metavar="LAYER|budget", help="Explain the choice for one layer, or the budget.")
@click.pass_obj
def command(out: Output, target: str, inputs: str | None, trust: bool, why: str | None) -> None:
    if Path(target).is_dir() and (Path(target) / "manifest.json").exists():
        if why is not None:
            show_why(out, read_stored_report(target), why)
        else:
            _inspect_artifact(out, target)
        return
    if why is not None:
        raise UsageError(
            f"--why is answered for the folder of an artifact, {target!r} is none",
            code="why-without-artifact",
            hint="mopt compile first",
        )
    with out.user_code(), ConsoleProgress(out) as progress:
        data = _read_model(target, inputs, trust, progress)
    if out.as_json:
        out.document(data)
        return
    out.text(f"{data['model']}", bold=True)
    _show_shapes(out, data)
    out.text()
    columns = [
        Column("layer"), Column("kind"), Column("shape"), Column("parameters", right=True),
        Column("FLOPs", right=True), Column("bytes", right=True), Column("format"),
    ]  # fmt: skip
    rows = [
        [row["path"], row["kind"], _shape(row["shape"]), count(row["parameters"]),
         count(row["flops"]), disk_size(row["bytes"]), row["format"]]
        for row in data["layers"]
    ]  # fmt: skip
    _show_layers(out, columns, rows, data["layers"])
    out.text()
    out.text(
        f"{plural(len(data['layers']), 'layer')}, {count(data['parameters'])} parameters, "
        f"{disk_size(data['bytes'])}, {count(data['flops'])} FLOPs a run on the example inputs"
    )
    for line in coverage_lines(data["coverage"]):
        out.text(line)


def _read_model(
    target: str, inputs: str | None, trust: bool, progress: ConsoleProgress
) -> dict[str, Any]:
    from mopt.model_source import load_source

    progress.stage("Loading", target)
    source = load_source(target, trust=trust, inputs=inputs)
    progress.end(target)

    from mopt.frontend import capture
    from mopt.layers import find_layers
    from mopt.program_signature import signature_of

    progress.stage("Capturing", target)
    program = capture(source.model, source.example_inputs, source.dynamic_shapes)
    coverage = program.coverage
    progress.end(f"{coverage.parameters:.0%} of parameters, {coverage.flops:.0%} of FLOPs")
    rows = []
    for part in program.parts().values():
        for layer in find_layers(part):
            weight = part.weight(layer.weight)
            rows.append({
                "path": layer.path,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "parameters": prod(layer.shape),
                "flops": layer.flops,
                "bytes": weight.numel() * weight.element_size(),
                "format": str(weight.dtype).removeprefix("torch."),
                "source": layer.source,
            })  # fmt: skip
    whole = signature_of(program) if coverage.is_whole else None
    return {
        "model": source.name,
        "inputs": _described(whole.inputs) if whole else [],
        "outputs": _described(whole.outputs) if whole else [],
        "parameters": program.parameter_count(),
        "bytes": program.size_bytes(),
        "flops": program.flops(),
        "coverage": {
            "parameters": coverage.parameters,
            "flops": coverage.flops,
            "outside": [vars(part) for part in coverage.outside],
        },
        "layers": rows,
    }


def _inspect_artifact(out: Output, target: str) -> None:
    from mopt.lowering import read_manifest
    from mopt.signature import Signature

    manifest = read_manifest(target, check_hashes=False)
    report = read_stored_report(target)
    signatures = [Signature.from_json(part["signature"]) for part in manifest["parts"]]
    whole = signatures[0] if manifest["kind"] == "whole" else None
    data = {
        "artifact": target,
        "model": manifest["model"],
        "backend": manifest["backend"],
        "target": manifest["target"],
        "recipe": report["recipe"] if report else None,
        "inputs": _described(whole.inputs) if whole else [],
        "outputs": _described(whole.outputs) if whole else [],
        "files": {name: entry["bytes"] for name, entry in manifest["files"].items()},
        "report": report,
    }
    kernels = _kernels(Path(target), manifest)
    if out.as_json:
        out.document({**data, "kernels": kernels} if kernels else data)
        return
    out.text(
        f"{data['model']}: {data['recipe'] or 'lowered without a report'}, {data['backend']}, "
        f"for {data['target']}",
        bold=True,
    )
    _show_shapes(out, data)
    if report is not None:
        _show_report(out, report)
    _show_kernels(out, kernels)


def _kernels(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What the backend says of the kernels in each part; nothing for those that ship none."""
    from mopt.registry import find_backend

    describe = getattr(find_backend(manifest["backend"]), "describe", None)
    if describe is None:
        return []
    return [describe(folder / part["folder"]) for part in manifest["parts"]]


def _show_kernels(out: Output, parts: list[dict[str, Any]]) -> None:
    """Registers, shared memory and spills of every binary; with -v also what was not taken."""
    columns = [
        Column("kernel"), Column("for"), Column("chip"), Column("tile"),
        Column("registers", right=True), Column("shared", right=True), Column("spills", right=True),
    ]  # fmt: skip
    for part in parts:
        rows = [
            [entry["name"], _kind(entry), arch, _tile(entry), str(entry["registers"]),
             disk_size(entry["shared"]), str(entry["spills"])]
            for arch, found in sorted(part["binaries"].items())
            for entry in sorted(found.values(), key=lambda e: (e["name"], _kind(e), _tile(e)))
            if out.verbose or arch == part["target"]
        ]  # fmt: skip
        out.text()
        out.text(
            f"{plural(len(part['lowered']), 'layer')} in kernels "
            f"({part['share']:.1%} of the estimated time), triton {part['triton']}"
        )
        if rows:
            out.table(columns, rows)
        for one in part["left"]:
            out.text(f"PyTorch runs {one['site']}: {one['reason']}")
        if out.verbose:
            for one in part["rejected"]:
                out.text(f"not taken on {one['architecture']}: {one['tile']}: {one['reason']}")
            for one in part["pytorch"]:
                out.text(
                    f"PyTorch runs {one['operator']}: {plural(one['calls'], 'call')}, "
                    f"{one['time']:.1%} of the estimated time"
                )


def _kind(entry: dict[str, Any]) -> str:
    """The constants that say what a binary computes: formats and types, and what is switched on."""
    words = [
        name.lower() if value == "True" else value
        for name, value in entry["constants"].items()
        if value != "False" and not value.isdigit()
    ]
    return " ".join(words)


def _tile(entry: dict[str, Any]) -> str:
    """The constants that are sizes, and how the binary is launched."""
    sizes = [f"{name}{value}" for name, value in entry["constants"].items() if value.isdigit()]
    return " ".join([*sizes, f"w{entry['warps']}", f"s{entry['stages']}"])


def _show_report(out: Output, report: dict[str, Any]) -> None:
    out.text()
    out.table(RESULT_COLUMNS, result_rows(report))
    out.text()
    columns = [
        Column("layer"), Column("kind"), Column("shape"), Column("parameters", right=True),
        Column("FLOPs", right=True), Column("before", right=True), Column("after", right=True),
        Column("format"),
    ]  # fmt: skip
    rows = [
        [row["path"], row["kind"], _shape(row["shape"]), count(prod(row["shape"])),
         count(row["flops"]), disk_size(row["bytes_before"]), disk_size(row["bytes_after"]),
         row["format"]]
        for row in report["layers"]
    ]  # fmt: skip
    _show_layers(out, columns, rows, report["layers"])
    for line in coverage_lines(report["coverage"]):
        out.text(line)


def _show_layers(
    out: Output, columns: list[Column], rows: list[list[str]], layers: list[dict[str, Any]]
) -> None:
    """The table of layers; with -v also where each is in the source."""
    if out.verbose:
        columns = [*columns, Column("source")]
        rows = [[*row, layer["source"]] for row, layer in zip(rows, layers, strict=True)]
    out.table(columns, rows)


def _described(specs: Iterable[TensorSpec]) -> list[str]:
    return [f"{spec.name} {spec.describe()}" for spec in specs]


def _show_shapes(out: Output, data: dict[str, Any]) -> None:
    for key in ("inputs", "outputs"):
        if data[key]:
            out.text(f"  {key:<8} {', '.join(data[key])}")


def _shape(sizes: list[int]) -> str:
    return " x ".join(str(size) for size in sizes)
