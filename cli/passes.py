"""The passes a recipe can be made of: list them, explain one."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any, get_type_hints

import click

from mopt.cli._command import Group
from mopt.cli._output import Column, Output
from mopt.registry import PassListing, find_pass, list_passes


@click.group(cls=Group, help=__doc__)
def command() -> None:
    pass


@command.command("list")
@click.pass_obj
def list_command(out: Output) -> None:
    """Every pass with its family and its numerics."""
    listings = list(list_passes().values())
    if out.as_json:
        out.document({"passes": [_listing(one) for one in listings]})
        return
    out.table(
        [Column("family"), Column("pass"), Column("numerics"), Column("")],
        [[one.family, one.name, one.numerics, one.summary] for one in listings],
    )


@command.command("explain")
@click.argument("name")
@click.pass_obj
def explain_command(out: Output, name: str) -> None:
    """What a pass does, when to use it, its limits and its options."""
    cls = find_pass(name)
    listing = list_passes()[cls.pass_name]
    hints = get_type_hints(cls)
    # The options of the pass first; those that every pass has come last.
    base = [spec for spec in fields(cls) if spec.name in ("layers", "skip")]
    specs = [spec for spec in fields(cls) if spec not in base] + base
    if out.as_json:
        options = [_option_data(spec, hints[spec.name]) for spec in specs]
        out.document({**_listing(listing), "doc": listing.doc, "options": options})
        return
    out.text(f"{listing.name}  ({listing.family}, {listing.numerics})", bold=True)
    out.text()
    for line in listing.doc.splitlines():
        out.text(line.removeprefix("## "), bold=line.startswith("## "))
    out.text()
    out.text("Options", bold=True)
    out.table(
        [Column("name"), Column("type"), Column("default"), Column("limits"), Column("")],
        [
            [spec.name, _type_name(hints[spec.name]), _default(spec), _limits(spec),
             str(spec.metadata.get("help", ""))]
            for spec in specs
        ],
    )  # fmt: skip
    out.text(f"\nTry: mopt compile MODEL --set {listing.name}.{specs[0].name}=...")


def _listing(one: PassListing) -> dict[str, str]:
    return {
        "name": one.name, "family": one.family, "numerics": one.numerics, "summary": one.summary,
    }  # fmt: skip


def _option_data(spec: Field[Any], hint: Any) -> dict[str, Any]:
    choices = spec.metadata.get("choices")
    return {
        "name": spec.name,
        "type": _type_name(hint),
        "default": spec.default,
        "min": spec.metadata.get("min"),
        "max": spec.metadata.get("max"),
        "choices": list(choices) if choices is not None else None,
        "help": spec.metadata.get("help", ""),
    }


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint).replace("None", "none")


def _default(spec: Field[Any]) -> str:
    return '""' if spec.default == "" else str(spec.default)


def _limits(spec: Field[Any]) -> str:
    low, high = spec.metadata.get("min"), spec.metadata.get("max")
    choices = spec.metadata.get("choices")
    if choices is not None:
        return ", ".join(str(choice) for choice in choices)
    if low is not None and high is not None:
        return f"{low} to {high}"
    if low is not None:
        return f"at least {low}"
    return f"at most {high}" if high is not None else ""
