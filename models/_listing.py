"""Find the models by reading the files of this folder; torch is imported only by `load`."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mopt.models._entry import ZooModel


@dataclass(frozen=True)
class Listing:
    """One line about a model: its name, what it is, and whether it comes with trained weights."""

    name: str
    summary: str
    trained: bool


def names() -> list[Listing]:
    """Every model of the zoo, by name.

    A model is a file here whose name has no leading underscore, with a docstring and the constants
    NAME and TRAINED; nothing else has to be edited to add one.
    """
    return sorted((listing for listing, _ in _files()), key=lambda listing: listing.name)


def load(name: str) -> ZooModel:
    """Import the one file of model `name` and return its `MODEL`. KeyError when there is none."""
    stems = {listing.name: stem for listing, stem in _files()}
    return import_module(f"{__package__}.{stems[name]}").MODEL


def _files() -> list[tuple[Listing, str]]:
    paths = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return [(_read(path), path.stem) for path in paths]


def _read(path: Path) -> Listing:
    tree = ast.parse(path.read_bytes())
    constants = {
        target.id: statement.value.value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    return Listing(constants["NAME"], summary, constants["TRAINED"])
