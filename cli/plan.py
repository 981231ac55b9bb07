"""Plan memory: offsets for buffers, an arena for a model, or what a small fast memory holds.

TARGET is a table of buffers (a CSV file) or a MODEL as mopt compile takes it.

\b
- Buffers get offsets in one memory: the least peak, or a layout within --capacity. Columns are id,
  lower, upper and size, and where needed alignment, gaps, offset (fixed) and hint: the format of
  the public MiniMalloc instances. A buffer is alive from step lower to before step upper.
- A model is captured and simplified as by mopt compile, and the order of its calls and the offset
  of every result planned for a device that keeps inputs, outputs and all between in one arena.
- A model with --fast-memory, or -t with a device: what lies in a fast memory of that size when,
  and what moves between it and a slow one, weights included.

Models are planned at the sizes of their example inputs. ONNX Runtime sorts nodes by itself, so
--onnx measures both orders in fresh processes and keeps the planned one only where it helps. What
an artifact of the eager backend needs is planned by mopt compile --backend eager --recipe
least-memory. Exit code 1 says that buffers do not fit, or that no layout was found in time.

\b
Examples:
  mopt plan buffers.csv --capacity 1MiB -o solution.csv
  mopt plan zoo:unet2d -o plan.json --header plan.h
  mopt plan zoo:mobilenet-v2 --fast-memory 25%
  mopt plan zoo:gpt-12x768 -t h200 --fast-memory 200MiB
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mopt.cli._command import Command, option
from mopt.cli._output import Output
from mopt.cli._plan_buffers import plan_buffers
from mopt.errors import UsageError
from mopt.quantity import read_bytes

# Files that are models though they are files.
_MODELS = (".py", ".pt2")


class _Bytes(click.ParamType):
    """A number of bytes: 1048576, 64KiB, 1.5MB."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The whole number, or a usage error."""
        if isinstance(value, int):
            return value
        found = read_bytes(value)
        if found is None:
            self.fail(f"{value!r} is no number of bytes such as 65536, 64KiB or 1.5MB", param, ctx)
        return found


@click.command(cls=Command, help=__doc__)
@click.argument("target", metavar="TARGET")
@click.option(
    "-o", "--output", metavar="FILE", help="Where the solution (CSV) or plan (JSON) goes."
)
@option(
    "--time-limit", type=click.FloatRange(min=0, min_open=True), default=30.0, metavar="S",
    show_default=True, help="Seconds to look for a better plan or a proof.",
)  # fmt: skip
@option("--seed", type=int, default=0, metavar="N", help="Of the disturbed orders that are tried.")
@option("--capacity", type=_Bytes(), metavar="N", help="Buffers: bytes to fit into, such as 64KiB.")
@option("--inputs", metavar="FILE.npz", help="Model: example inputs.")
@click.option("--trust", is_flag=True, help="Model: load a .pt2, which runs code from the file.")
@click.option("--as-captured", is_flag=True, help="Model: plan its graph without simplifying it.")
@click.option("--header", metavar="FILE.h", help="Model: where a C header with all buffers goes.")
@click.option(
    "--tflm", metavar="FILE.bin", help="Model: where offsets for TensorFlow Lite Micro go."
)
@click.option(
    "--onnx", metavar="FOLDER", help="Model: an ONNX artifact in the order that really takes less."
)
@option("--fast-memory", metavar="N|SHARE", help="Model: its size, 8MiB or 25% of all bytes.")
@option("-t", "--target", "device", metavar="DEVICE", help="Model: a device with two memories.")
@option(
    "--minimise", type=click.Choice(["bytes", "time"]), default="bytes", show_default=True,
    help="Fast memory: bytes moved, or estimated time.",
)  # fmt: skip
@click.option("--no-weights", is_flag=True, help="Fast memory: weights lie in one of their own.")
@click.pass_obj
def command(
    out: Output,
    target: str,
    output: str | None,
    time_limit: float,
    seed: int,
    capacity: int | None,
    **model: Any,
) -> None:
    if _is_table(target):
        _refuse(target, "a table of buffers", model)
        plan_buffers(out, target, capacity, output, time_limit, seed)
        return
    _refuse(target, "a model", {"capacity": capacity})
    from mopt.cli._plan_model import plan_arena, plan_moves

    if model["fast_memory"] is None and model["device"] is None:
        _refuse(target, "planned for one arena", {"no_weights": model["no_weights"]})
        plan_arena(out, target, model, output, time_limit, seed)
        return
    _refuse(
        target,
        "planned for two memories",
        {k: model[k] for k in ("header", "tflm", "onnx", "as_captured")},
    )
    plan_moves(out, target, model, output, time_limit, seed)


def _is_table(target: str) -> bool:
    path = Path(target)
    return path.suffix.lower() == ".csv" or (path.is_file() and path.suffix not in _MODELS)


def _refuse(target: str, what: str, options: dict[str, Any]) -> None:
    """UsageError where an option was given that means nothing here."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    names = {"device": "-t"}
    for name in options:
        if context.get_parameter_source(name) is not default:
            flag = names.get(name, "--" + name.replace("_", "-"))
            raise UsageError(
                f"{flag} has no meaning where {target!r} is {what}",
                code="option-without-meaning",
                hint="mopt plan --help says which options go together",
            )
