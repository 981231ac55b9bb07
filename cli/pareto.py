"""Show what size and speed cost in quality: the front of best choices of a model.

MODEL is as for mopt compile. Each point is one solved choice of formats for all layers, from the
same measured losses and times of operators; no point is compiled, so its totals are estimates. Give
a point's budget to mopt compile, with --budget minimize=loss, to get the model. Any device may be
the target.

\b
Examples:
  mopt pareto zoo:pydoc-gpt --points 12
  mopt pareto net.py:factory --along latency --png front.png
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import click

from mopt.cli._command import Command, option
from mopt.cli._output import Column, Output
from mopt.cli._progress import ConsoleProgress
from mopt.cli._text import disk_size, milliseconds
from mopt.device import find_device
from mopt.errors import UsageError

_WIDTH, _HEIGHT = 60, 14


@click.command(cls=Command, help=__doc__)
@click.argument("model")
@option("-t", "--target", default="host", show_default=True, help="Device the result is for.")
@option("--points", type=click.IntRange(2, 100), default=12, show_default=True, metavar="N",
        help="How many budgets to solve for.")  # fmt: skip
@option("--along", type=click.Choice(["size", "latency"]), default="size", show_default=True,
        help="What is limited from point to point; loss is minimized.")  # fmt: skip
@option("--measure/--no-measure", default=True, envvar="MOPT_MEASURE",
        help="Whether to time operators, where the target is this machine.")  # fmt: skip
@option("--threads", type=click.IntRange(min=1), metavar="N",
        help="Threads that the model is to run with; default: what the runtime picks.")  # fmt: skip
@option("--png", metavar="FILE", help="Also draw it into a file (needs matplotlib).")
@option("--inputs", metavar="FILE.npz", help="Example inputs, named as the arguments of forward.")
@click.option("--trust", is_flag=True, help="Load a .pt2, which runs code from the file.")
@click.pass_obj
def command(out: Output, model: str, **options: Any) -> None:
    find_device(options["target"])
    if options["png"] and find_spec("matplotlib") is None:
        raise UsageError(
            "--png needs matplotlib, which is not installed",
            code="missing-package",
            hint="pip install 'mopt[report]', or leave --png away: the terminal shows it too",
        )
    with out.user_code(), ConsoleProgress(out) as progress:
        progress.stage("Loading", model)
        from mopt.model_source import load_source

        source = load_source(model, trust=options["trust"], inputs=options["inputs"])
        progress.end(model)
        from mopt.front import solve_front

        front = solve_front(
            source.model, source.example_inputs, target=options["target"],
            along=options["along"], points=options["points"], calibration=source.calibration,
            evaluate=source.evaluate, dynamic_shapes=source.dynamic_shapes,
            measure=options["measure"], threads=options["threads"], progress=progress,
        )  # fmt: skip
    if options["png"]:
        _draw_png(front, options["along"], options["png"])
    if out.as_json:
        out.document({"model": source.name, "along": options["along"], "points": front})
        return
    out.text(f"{source.name}: least loss for each {options['along']}, estimated", bold=True)
    for line in draw([(p[options["along"]], p["loss"]) for p in front]):
        out.text(line)
    columns = [Column("budget"), Column("size", right=True), Column("latency", right=True),
               Column("loss", right=True), Column("formats")]  # fmt: skip
    rows = [
        [p["budget"], disk_size(int(p["size"])), f"{milliseconds(p['latency'])} estimated",
         f"{p['loss']:.3g}", ", ".join(f"{n} x {name}" for name, n in p["formats"].items())]
        for p in front
    ]  # fmt: skip
    out.table(columns, rows)


def draw(points: list[tuple[float, float]]) -> list[str]:
    """The points in a field of characters, the first coordinate to the right; [] for none."""
    if not points:
        return []
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_span = min(xs), max(xs) - min(xs) or 1.0
    y_low, y_span = min(ys), max(ys) - min(ys) or 1.0
    field = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for x, y in points:
        column = round((x - x_low) / x_span * (_WIDTH - 1))
        row = round((y - y_low) / y_span * (_HEIGHT - 1))
        field[_HEIGHT - 1 - row][column] = "o"
    label = [f"{max(ys):9.3g}", *[" " * 9] * (_HEIGHT - 2), f"{min(ys):9.3g}"]
    lines = [f"{left} |{''.join(row).rstrip()}" for left, row in zip(label, field, strict=True)]
    low, high = f"{min(xs):.3g}", f"{max(xs):.3g}"
    return [*lines, " " * 10 + "+" + "-" * _WIDTH,
            " " * 11 + low + high.rjust(_WIDTH - len(low))]  # fmt: skip


def _draw_png(front: list[dict[str, Any]], along: str, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.plot([p[along] for p in front], [p["loss"] for p in front], "o-")
    axes.set_xlabel("size (bytes)" if along == "size" else "latency (ms, estimated)")
    axes.set_ylabel("loss (estimated)")
    figure.savefig(path)
