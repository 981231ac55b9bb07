"""Run an artifact on inputs from a file.

INPUT and OUTPUT are npz files with an array for each input and output of the model. Hashes are
checked first, and nothing from the artifact is executed as code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopt.cli._command import Command, option
from mopt.cli._output import Output
from mopt.errors import UsageError, quote

if TYPE_CHECKING:
    import numpy as np


@click.command(cls=Command, help=__doc__)
@click.argument("folder", metavar="DIR")
@click.option("--input", "input_file", required=True, metavar="FILE.npz", help="What to read.")
@click.option("--output", "output_file", required=True, metavar="FILE.npz", help="What to write.")
@click.option("--model", metavar="MODEL", help="Needed when parts of the model stayed eager.")
@click.option("--trust", is_flag=True, help="Load a .pt2 as MODEL, which runs code from the file.")
@option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads of the runtime.")
@click.pass_obj
def command(
    out: Output,
    folder: str,
    input_file: str,
    output_file: str,
    model: str | None,
    trust: bool,
    threads: int | None,
) -> None:
    parent = Path(output_file).resolve().parent
    if not parent.is_dir():
        raise UsageError(f"no folder {quote(str(parent))} to write to", code="folder-not-found")
    with out.user_code():
        arrays = _run(folder, input_file, model, trust, threads)
    from mopt.npz_files import write_npz

    write_npz(output_file, arrays)
    found = {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
    if out.as_json:
        out.document({"output": output_file, "arrays": found})
        return
    listed = ", ".join(f"{name} {what}" for name, what in found.items())
    out.text(f"Wrote {output_file}  ({listed})")


def _run(
    folder: str, input_file: str, model: str | None, trust: bool, threads: int | None
) -> dict[str, np.ndarray]:
    from mopt.input_files import named_arrays, nest_inputs, read_call, read_flat
    from mopt.lowering import open_artifact, read_manifest
    from mopt.model_source import load_source
    from mopt.probing import probe_artifact
    from mopt.signature import Signature

    manifest = read_manifest(folder)
    module = load_source(model, trust=trust).model.eval() if model is not None else None
    args: tuple[Any, ...] = ()
    if manifest["kind"] == "whole":
        signature = Signature.from_json(manifest["parts"][0]["signature"])
        args, kwargs = nest_inputs(signature, read_flat(input_file, signature))
    elif module is not None:
        kwargs = read_call(input_file, module)
    else:
        raise UsageError(
            "parts of this model stayed eager, so it needs the original module to run",
            code="needs-module",
            hint="pass --model MODEL as it was given to mopt compile",
        )
    probe_artifact(folder, manifest)
    with open_artifact(Path(folder), manifest, module=module, threads=threads) as loaded:
        return named_arrays(loaded(*args, **kwargs))
