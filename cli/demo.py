"""Compile a trained language model to int8 and int4, and show what it gained.

The model is zoo:pydoc-gpt, 4.9 million parameters, trained on Python's own documentation. Size,
latency and bits per byte are measured here, beside the same model lowered without compression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mopt.cli._command import Command
from mopt.cli._output import Column, Output
from mopt.cli._progress import ConsoleProgress
from mopt.cli._text import disk_size, milliseconds, safe
from mopt.errors import unknown_name

if TYPE_CHECKING:
    from mopt.lowering import Artifact
    from mopt.models._entry import ZooModel

NAME = "pydoc-gpt"
RECIPES = ("int8-dynamic", "int4-weight")


@click.command(cls=Command, help=__doc__)
@click.option("--model", default=NAME, show_default=True, help="A trained model of the zoo.")
@click.pass_obj
def command(out: Output, model: str) -> None:
    from mopt import models

    trained = [listing.name for listing in models.names() if listing.trained]
    if model not in trained:
        raise unknown_name("trained model", model, trained, "mopt models list")
    entry = models.load(model)
    rows: list[list[str]] = []
    samples: list[str] = []
    reports: dict[str, Any] = {}
    with ConsoleProgress(out) as progress:
        for recipe in RECIPES:
            out.note(f"mopt compile zoo:{model} -r {recipe}")
            artifact = _compile(entry, recipe, progress)
            assert artifact.report is not None
            data = artifact.report.data
            if not rows:
                rows.append(_row("uncompressed", data, "baseline", None))
                if entry.sample:
                    assert artifact.program is not None
                    samples.append(f"uncompressed  {safe(entry.sample(entry.build()))}")
            rows.append(_row(recipe, data, "result", data["speed"]))
            if entry.sample:
                with artifact.load() as run:
                    samples.append(f"{recipe:<12}  {safe(entry.sample(run))}")
            reports[recipe] = data
    if out.as_json:
        out.document({"reports": reports, "samples": samples})
        return
    metric = next(iter(reports.values()))["quality"]["metric"]
    out.table(
        [Column(""), Column("size, measured", right=True), Column("latency, measured", right=True),
         Column("against uncompressed (99 % interval)"), Column(f"{metric}, measured", right=True)],
        rows,
    )  # fmt: skip
    out.text("\n" + "\n".join(samples))
    out.text(f"\nNext: mopt compile zoo:{model} -r int8-dynamic -o out/{model}")


def _compile(entry: ZooModel, recipe: str, progress: ConsoleProgress) -> Artifact:
    import mopt

    return mopt.compile(
        entry.build(),
        entry.example_inputs(),
        recipe=recipe,
        dynamic_shapes=entry.dynamic_shapes() if entry.dynamic_shapes else None,
        calibration=entry.calibration() if entry.calibration else None,
        evaluate=entry.evaluate,
        name=entry.name,
        progress=progress,
    )


def _row(label: str, data: dict[str, Any], side: str, speed: dict[str, Any] | None) -> list[str]:
    found = data[side]
    latency = found["latency_ms"]["measured"]
    against = ""
    if speed is not None:
        low, high = speed["ratio_low"], speed["ratio_high"]
        against = f"{speed['ratio']:.2f}x the time ({low:.2f}x to {high:.2f}x)"
    quality = data["quality"]["baseline" if side == "baseline" else "result"]
    return [
        label,
        disk_size(found["size_bytes"]),
        milliseconds(latency) if latency else "not measured",
        against,
        f"{quality:.4f}",
    ]
