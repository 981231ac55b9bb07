"""Find the models by reading the files of this folder; torch is imported only by `load`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
    NAME and TRAINED; nothing else has to be edited to add one. A file without them raises
    ValueError.
    """
    return sorted((listing for listing, _ in _files()), key=lambda listing: listing.name)


def load(name: str) -> ZooModel:
    """Import the one file of model `name` and return its `MODEL`. KeyError when there is none."""
    stems = {listing.name: stem for listing, stem in _files()}
    return import_module(f"{__package__}.{stems[name]}").MODEL


def _files() -> list[tuple[Listing, str]]:
    paths = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return [(read(path), path.stem) for path in paths]


def read(path: Path) -> Listing:
    """What one model file says about itself; the file is parsed, not run."""
    tree = ast.parse(path.read_bytes())
    constants = dict(_constants(tree))
    name, trained = constants.get("NAME"), constants.get("TRAINED")
    if not isinstance(name, str) or not isinstance(trained, bool):
        raise ValueError(f"{path}: a model file needs a string NAME and a boolean TRAINED")
    return Listing(name, (ast.get_docstring(tree) or "").partition("\n")[0], trained)


def _constants(tree: ast.Module) -> Iterator[tuple[str, object]]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        if isinstance(statement.value, ast.Constant):
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, statement.value.value
