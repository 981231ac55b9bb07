"""Finding passes, backends and presets by name, without importing torch to list them.

A pass is found by reading the sources of the families with ``ast``: its decorator gives the name,
its docstring the description. Its module is imported only when the pass is asked for. Packages
outside mopt add passes through the entry-point group ``mopt.passes`` (name = ``module:Class``).
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopt.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from mopt.lowering import Backend
    from mopt.memory import MemoryPlan
    from mopt.pass_base import Pass
    from mopt.recompute import RecomputePlan


@dataclass(frozen=True)
class PassListing:
    """A pass as its source states it."""

    name: str
    family: str
    summary: str
    numerics: str
    module: str
    class_name: str
    doc: str


def package_folder(package: str) -> Path:
    """The folder an installed package of mopt lies in, found without importing its modules."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, package
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def list_passes() -> dict[str, PassListing]:
    """Every pass by name, in the order of families and files."""
    found: dict[str, PassListing] = {}
    root = package_folder("mopt.passes")
    for file in sorted(root.glob("*/*.py")):
        if file.name.startswith("_"):
            continue
        module = f"mopt.passes.{file.parent.name}.{file.stem}"
        for listing in _read_passes(file, module):
            found[listing.name] = listing
    for entry in sorted(entry_points(group="mopt.passes"), key=lambda e: e.name):
        spec = find_spec(entry.module)
        if spec is None or spec.origin is None:
            raise UsageError(
                f"the installed pass {entry.name!r} names a missing module {entry.module!r}",
                code="broken-entry-point",
            )
        for listing in _read_passes(Path(spec.origin), entry.module):
            found[listing.name] = listing
    return found


def _read_passes(file: Path, module: str) -> list[PassListing]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    listings = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "register_pass":
                doc = ast.get_docstring(node) or ""
                numerics = next(
                    (ast.unparse(k.value) for k in decorator.keywords if k.arg == "numerics"), ""
                )
                listings.append(
                    PassListing(
                        name=ast.literal_eval(decorator.args[0]),
                        family=module.split(".")[-2],
                        summary=doc.split("\n")[0],
                        numerics=numerics.rpartition(".")[2].lower(),
                        module=module,
                        class_name=node.name,
                        doc=doc,
                    )
                )
    return listings


def find_pass(name: str) -> type[Pass]:
    """The class of a pass; names may be written with ``-`` or ``_``."""
    listings = list_passes()
    listing = listings.get(name.replace("_", "-"))
    if listing is None:
        raise unknown_name("pass", name, listings, "mopt passes list")
    cls: type[Pass] = getattr(import_module(listing.module), listing.class_name)
    return cls


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """A pass with options from text or TOML, each checked and converted."""
    from dataclasses import fields

    from mopt.pass_base import coerce_option

    cls = find_pass(name)
    known = {spec.name for spec in fields(cls)}
    values = {}
    for key, value in options.items():
        key = key.replace("-", "_")
        if key not in known:
            raise unknown_name("option", key, known, f"mopt passes explain {cls.pass_name}")
        values[key] = coerce_option(cls.pass_name, cls, key, value)
    return cls(**values)


def list_backends() -> list[str]:
    """The names of the backends: the folders beside one another."""
    root = package_folder("mopt.backends")
    return sorted(p.parent.name for p in root.glob("*/lower.py"))


def find_backend(name: str) -> Backend:
    """A backend by name."""
    if name not in list_backends():
        raise unknown_name("backend", name, list_backends(), "mopt compile --help")
    backend: Backend = import_module(f"mopt.backends.{name}.lower").BACKEND
    return backend


def find_placement() -> Callable[..., MemoryPlan]:
    """The solver of memory problems: ``place(problem, time_limit=..., seed=...)``."""
    place: Callable[..., MemoryPlan]
    place = import_module("mopt.passes.schedule.offsets").place
    return place


def find_step_planner() -> Callable[..., RecomputePlan]:
    """The planner of training steps: ``plan(problem, budget, seconds=..., solver=...)``."""
    plan: Callable[..., RecomputePlan] = import_module("mopt.passes.checkpoint.plan").plan
    return plan


def find_training_backend() -> Callable[..., Callable[..., Any]]:
    """What compiles one graph of dynamo's: ``compile_with(session, module, example_inputs)``."""
    found: Callable[..., Callable[..., Any]]
    found = import_module("mopt.backends.dynamo").compile_with
    return found
