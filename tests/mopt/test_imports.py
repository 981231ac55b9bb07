"""Who may import whom, what import costs, and that the package holds all folders."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mopt.registry import list_passes, package_folder

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "mopt": "mopt", "passes": "mopt.passes", "backends": "mopt.backends",
    "cost_models": "mopt.cost_models", "cli": "mopt.cli", "models": "mopt.models",
}  # fmt: skip
# What each folder may import of the others. Families, backends and zoo models see themselves only.
ALLOWED = {
    "mopt": {"mopt"},
    "passes": {"mopt"},
    "backends": {"mopt"},
    "cost_models": {"mopt", "mopt.cost_models"},
    "cli": {"mopt", "mopt.cli", "mopt.models"},
    "models": {"mopt.models"},
}
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The import name of a source file: ``passes/a/b.py`` is ``mopt.passes.a.b``."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join([FOLDERS[folder], *rest])
    return name.removesuffix(".__init__")


def package_of(name: str) -> str:
    """The folder, by import name, that a module of mopt lies in."""
    return max((own for own in FOLDERS.values() if f"{name}.".startswith(f"{own}.")), key=len)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module a file imports anywhere in it, absolute, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} uses a relative import"
            assert node.module
            for alias in node.names:  # "from mopt import x" may mean the module mopt.x
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if _is_module(whole) else node.module


def _is_module(name: str) -> bool:
    return name in MODULES


MODULES = {module_name(path) for path in SOURCES}


def _unit(name: str) -> str:
    """The pass family or the backend that a module belongs to, else its folder."""
    package = package_of(name)
    if package in ("mopt.passes", "mopt.backends"):
        return ".".join(name.split(".")[:3])
    return package


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_between_folders(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    own = module_name(path)
    for line, name in imports(path):
        top = name.split(".")[0]
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert top not in set(FOLDERS) - {"mopt"}, f"{where}: write mopt.{name}"
        assert top not in ("tests", "benchmarks"), where
        if top == "mopt":
            same_unit = _unit(name) == _unit(own)
            assert same_unit or package_of(name) in ALLOWED[folder], where


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_pass_imports_no_other_pass(path: Path) -> None:
    own = module_name(path)
    passes = {listing.module for listing in list_passes().values()}
    if own in passes:
        assert not [name for _, name in imports(path) if name in passes - {own}]


def test_folders_are_the_packages_of_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    declared = set(config["options"]["packages"].split())
    found = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    assert declared == found
    for folder in {path.parent for path in SOURCES}:
        assert (folder / "__init__.py").is_file(), folder.relative_to(ROOT)


def test_no_file_of_the_core_hides_a_folder_or_a_public_name() -> None:
    import mopt

    stems = {path.stem for path in (ROOT / "mopt").glob("*.py")}
    assert stems.isdisjoint({"passes", "backends", "cost_models", "cli", "models"})
    assert stems.isdisjoint(set(mopt.__all__))


def test_package_folders_are_found_without_importing_them() -> None:
    assert package_folder("mopt.passes") == ROOT / "passes"


def loaded_after(code: str) -> set[str]:
    """The modules a fresh interpreter has loaded after running ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import mopt",
        "import mopt; dir(mopt)",
        "from mopt.registry import list_passes; assert 'fold-constants' in list_passes()",
        "from mopt.registry import list_backends; list_backends()",
        "from mopt.recipe import Recipe; Recipe.load('none')",
        "import mopt.models",
        "import mopt.cli.main",
    ],
)
def test_listing_does_not_import_torch(code: str) -> None:
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "transformers", "triton", "pulp"}
    assert loaded_after(code) & heavy == set()


def test_public_names_exist() -> None:
    import mopt

    for name in mopt.__all__:
        assert getattr(mopt, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'capure'"):
        mopt.capure  # noqa: B018
