"""The recipes that come with mopt: which passes run with which options."""

from __future__ import annotations

import click

from mopt.cli._command import Group
from mopt.cli._output import Column, Output
from mopt.recipe import Recipe, preset_files


@click.group(cls=Group, help=__doc__)
def command() -> None:
    pass


@command.command("list")
@click.pass_obj
def list_command(out: Output) -> None:
    """Every recipe by name; use one with `mopt compile -r NAME`."""
    recipes = [Recipe.load(name) for name in preset_files()]
    if out.as_json:
        out.document({
            "recipes": [
                {"name": one.name, "summary": one.summary, "passes": [s.name for s in one.specs]}
                for one in recipes
            ]
        })  # fmt: skip
        return
    out.table([Column("recipe"), Column("")], [[one.name, one.summary] for one in recipes])


@command.command("show")
@click.argument("name")
@click.option("--full", is_flag=True, help="Write every option, defaults included.")
@click.pass_obj
def show_command(out: Output, name: str, full: bool) -> None:
    """A recipe as TOML, to be changed and given back with `mopt compile -r FILE.toml`."""
    recipe = Recipe.load(name)
    if out.as_json:
        passes = [{"name": spec.name, "options": spec.options} for spec in recipe.specs]
        out.document({"name": recipe.name, "summary": recipe.summary, "passes": passes})
        return
    out.text(recipe.to_toml(full=full).rstrip("\n"))
