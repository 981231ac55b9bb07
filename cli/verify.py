"""Check that an artifact is intact and computes what it should.

First every file is compared with its hash. Then the artifact runs on the sample inputs it carries
and must give the outputs stored with them; with --model it also runs beside the original model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopt.cli._command import Command, option
from mopt.cli._output import Column, Output
from mopt.cli._stored_report import read_stored_report
from mopt.cli._text import disk_size, plural
from mopt.errors import ArtifactError

if TYPE_CHECKING:
    from mopt.lowering import Loaded
    from mopt.quality import Drift

# A compressed model may be this much further from the original than its report says: the report
# was made on calibration data, this check uses the example inputs.
_MORE_DRIFT = 2.0
_FREE_DRIFT = 1e-3


@click.command(cls=Command, help=__doc__)
@click.argument("folder", metavar="DIR")
@click.option("--model", metavar="MODEL", help="The original model, as given to mopt compile.")
@click.option("--inputs", metavar="FILE.npz", help="Inputs for MODEL instead of its examples.")
@click.option("--trust", is_flag=True, help="Load a .pt2 as MODEL, which runs code from the file.")
@option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads of the runtime.")
@click.pass_obj
def command(
    out: Output,
    folder: str,
    model: str | None,
    inputs: str | None,
    trust: bool,
    threads: int | None,
) -> None:
    from mopt.lowering import SAMPLE, read_manifest
    from mopt.probing import probe_artifact

    manifest = read_manifest(folder)
    files = manifest["files"]
    size = sum(entry["bytes"] for entry in files.values())
    rows = [["files", f"{plural(len(files), 'file')}, {disk_size(size)}: every hash matches"]]
    found: dict[str, Any] = {"files": len(files), "bytes": size, "sample": None, "model": None}
    with out.user_code():
        probe_artifact(folder, manifest)
        if SAMPLE in files and manifest["kind"] == "whole":
            drift = _check_sample(Path(folder), manifest, threads)
            found["sample"] = drift.as_json()
            rows.append(["sample", f"same outputs as stored: {_describe(drift)}"])
        else:
            rows.append(["sample", "not checked: the artifact carries no sample"])
        if model is not None:
            drift = _check_model(Path(folder), manifest, model, inputs, trust, threads)
            found["model"] = drift.as_json()
            rows.append(["model", f"close to {model}: {_describe(drift)}"])
        else:
            rows.append(["model", "not compared: pass --model MODEL to do so"])
    if out.as_json:
        out.document({"artifact": folder, "intact": True, **found})
        return
    if not out.quiet:
        out.table([Column(""), Column("")], rows)
    out.text(f"{folder} is intact")


def _describe(drift: Drift) -> str:
    return f"cosine {drift.cosine:.5f}, largest difference {drift.max_abs:.3g}"


def _may_round(folder: Path) -> bool:
    """Whether the artifact computes with rounded numbers, as far as is known."""
    report = read_stored_report(folder)
    return report is None or any(step["numerics"] == "lossy" for step in report["steps"])


def _check_sample(folder: Path, manifest: dict[str, Any], threads: int | None) -> Drift:
    """Run on the stored inputs and compare with the stored outputs."""
    import torch

    from mopt.input_files import convert, nest_inputs
    from mopt.lowering import SAMPLE
    from mopt.npz_files import read_npz
    from mopt.pipeline import flat_tensors
    from mopt.program_signature import plain_containers
    from mopt.proof import FLOAT_PARITY, INTEGER_PARITY
    from mopt.safe_read import Folder
    from mopt.signature import Signature

    with Folder(folder) as opened, opened.open_file(SAMPLE) as file:
        arrays = read_npz(file)
    signature = Signature.from_json(manifest["parts"][0]["signature"])
    wanted = [f"input_{i}" for i in range(len(signature.inputs))]
    wanted += [f"output_{i}" for i in range(len(signature.outputs))]
    if sorted(wanted) != sorted(arrays):
        raise ArtifactError(
            f"{SAMPLE} holds {sorted(arrays)}, expected {sorted(wanted)}", code="bad-sample"
        )
    flat = [
        convert(arrays[f"input_{i}"], getattr(torch, spec.dtype), spec.name)
        for i, spec in enumerate(signature.inputs)
    ]
    expected = [torch.from_numpy(arrays[f"output_{i}"]) for i in range(len(signature.outputs))]
    args, kwargs = nest_inputs(signature, flat)
    with _open(folder, manifest, threads) as loaded:
        outputs = flat_tensors(plain_containers(loaded(*args, **kwargs)))
    drift = _compare(expected, outputs, "the outputs stored with it")
    limit = INTEGER_PARITY if _may_round(folder) else FLOAT_PARITY
    if not (drift.relative <= limit or drift.cosine > 0.999):
        raise ArtifactError(
            f"the artifact computes something else than when it was made: {_describe(drift)}",
            code="parity",
            hint="the runtime here may treat it differently: compile again on this machine",
        )
    return drift


def _check_model(
    folder: Path,
    manifest: dict[str, Any],
    model: str,
    inputs: str | None,
    trust: bool,
    threads: int | None,
) -> Drift:
    """Run the artifact and the original side by side on the original's example inputs."""
    import torch

    from mopt.frontend import normalize_inputs
    from mopt.model_source import load_source
    from mopt.pipeline import flat_tensors
    from mopt.program_signature import plain_containers

    source = load_source(model, trust=trust, inputs=inputs)
    args, kwargs = normalize_inputs(source.example_inputs)
    module = source.model.eval()
    with torch.no_grad():
        expected = flat_tensors(plain_containers(module(*args, **kwargs)))
    with _open(folder, manifest, threads, module) as loaded:
        outputs = flat_tensors(plain_containers(loaded(*args, **kwargs)))
    drift = _compare(expected, outputs, model)
    report = read_stored_report(folder)
    if report is None:
        return drift
    recorded = 1.0 - float(report["quality"]["cosine"])
    if 1.0 - drift.cosine > _MORE_DRIFT * max(recorded, 0.0) + _FREE_DRIFT:
        raise ArtifactError(
            f"the artifact is further from {model} than its report says: {_describe(drift)}, "
            f"cosine {1.0 - recorded:.5f} in the report",
            code="parity",
            hint="see that MODEL is the one it was made from, with the same weights",
        )
    return drift


def _open(
    folder: Path, manifest: dict[str, Any], threads: int | None, module: Any = None
) -> Loaded:
    from mopt.lowering import open_artifact

    return open_artifact(folder, manifest, module=module, threads=threads)


def _compare(expected: list[Any], outputs: list[Any], what: str) -> Drift:
    from mopt.quality import drift

    shapes = [(tuple(t.shape), str(t.dtype)) for t in expected]
    found = [(tuple(t.shape), str(t.dtype)) for t in outputs]
    if shapes != found:
        raise ArtifactError(
            f"the artifact gives {found}, {what}: {shapes}",
            code="parity",
            hint="see that MODEL is the one it was made from",
        )
    return drift(expected, outputs)
