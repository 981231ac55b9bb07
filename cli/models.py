"""The zoo of models that come with mopt."""

from __future__ import annotations

import click

from mopt.cli._command import Group
from mopt.cli._output import Column, Output
from mopt.models import names


@click.group(cls=Group, help=__doc__)
def command() -> None:
    pass


@command.command("list")
@click.pass_obj
def list_command(out: Output) -> None:
    """Every model of the zoo and whether it has trained weights."""
    found = names()
    if out.as_json:
        out.document({
            "models": [
                {"name": one.name, "summary": one.summary, "trained": one.trained} for one in found
            ]
        })  # fmt: skip
        return
    out.table(
        [Column("model"), Column("weights"), Column("")],
        [[f"zoo:{one.name}", "trained" if one.trained else "random", one.summary] for one in found],
    )
