"""Recipe: which passes run with which options, as data.

    name = "int4-weight"
    extends = "none"            # the passes of another preset come first

    [[pass]]
    name = "quantize-weights"
    bits = 4
    group = 32
    skip = "head"

Readable and writable without torch; :meth:`Recipe.passes` builds the passes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopt.errors import UsageError, quote, unknown_name
from mopt.registry import find_pass, list_passes, make_pass, package_folder
from mopt.toml_files import parse_toml

if TYPE_CHECKING:
    from mopt.pass_base import Pass

_KEYS = {"name", "summary", "extends", "pass"}


@dataclass(frozen=True)
class PassSpec:
    """One pass of a recipe: its name and the options given."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A named list of pass specifications."""

    name: str
    specs: tuple[PassSpec, ...]
    summary: str = ""

    @staticmethod
    def load(name_or_path: str | Path) -> Recipe:
        """A preset by name, or a TOML file (anything with a slash or ending in ``.toml``)."""
        text = str(name_or_path)
        if text.endswith(".toml") or "/" in text:
            path = Path(text)
            if not path.is_file():
                raise UsageError(f"no recipe file {quote(text)}", code="missing-file")
            return Recipe.from_toml(path.read_bytes(), source=text)
        return _preset(text)

    @staticmethod
    def from_toml(text: bytes | str, source: str = "recipe") -> Recipe:
        """Parse and check a recipe. Raises UsageError or InputError naming the source."""
        data = parse_toml(text, name=source, error=UsageError).data
        unknown = set(data) - _KEYS
        if unknown:
            raise unknown_name("recipe key", min(unknown), _KEYS, "see docs/recipes.md")
        specs: list[PassSpec] = []
        if "extends" in data:
            # A preset only: a recipe from a stranger reads no other file, and ends.
            specs.extend(_preset(_text(data["extends"], "extends", source)).specs)
        entries = data.get("pass", [])
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise UsageError(f"{source}: 'pass' must be a list of tables: [[pass]]",
                             code="bad-recipe")  # fmt: skip
        for entry in entries:
            if "name" not in entry:
                raise UsageError(f"{source}: a [[pass]] has no name", code="bad-recipe")
            options = {k.replace("-", "_"): v for k, v in entry.items() if k != "name"}
            specs.append(PassSpec(_text(entry["name"], "name", source), options))
        return Recipe(
            name=_text(data.get("name", Path(source).stem), "name", source),
            specs=tuple(specs),
            summary=_text(data.get("summary", ""), "summary", source),
        )

    def with_settings(self, settings: list[str]) -> Recipe:
        """The recipe with ``pass.option=value`` settings applied (``-`` and ``_`` are the same).

        Raises UsageError for a pass that is not in the recipe or a setting of another form.
        """
        recipe = self
        for setting in settings:
            head, equals, value = setting.partition("=")
            name, dot, key = head.partition(".")
            if not equals or not dot or not key:
                raise UsageError(
                    f"--set {quote(setting)} is not of the form pass.option=value", code="bad-set"
                )
            wanted = name.strip().replace("_", "-")
            if wanted not in {spec.name for spec in recipe.specs}:
                if wanted not in list_passes():
                    raise unknown_name("pass", wanted, list_passes(), "mopt passes list")
                raise UsageError(
                    f"pass {wanted!r} is not in recipe {self.name!r}",
                    code="pass-not-in-recipe",
                    hint="the recipe runs: " + ", ".join(dict.fromkeys(s.name for s in self.specs)),
                )
            key = key.strip().replace("-", "_")
            specs = tuple(
                PassSpec(s.name, {**s.options, key: value}) if s.name == wanted else s
                for s in recipe.specs
            )
            recipe = replace(recipe, specs=specs)
        return recipe

    def passes(self) -> list[Pass]:
        """The passes, with every option checked and converted."""
        return [make_pass(spec.name, spec.options) for spec in self.specs]

    def check_names(self) -> None:
        """Raise UsageError for the first pass that does not exist."""
        for spec in self.specs:
            find_pass(spec.name)

    def to_toml(self, *, full: bool = False) -> str:
        """TOML that gives this recipe back; ``full`` writes every option with its value."""
        lines = [f"name = {_toml(self.name)}"]
        if self.summary:
            lines.append(f"summary = {_toml(self.summary)}")
        for spec in self.specs:
            options = make_pass(spec.name, spec.options).options() if full else spec.options
            lines += ["", "[[pass]]", f"name = {_toml(spec.name)}"]
            lines += [f"{k} = {_toml(v)}" for k, v in options.items() if v is not None]
        return "\n".join(lines) + "\n"


def preset_files() -> dict[str, Path]:
    """The named presets: one TOML file each."""
    folder = package_folder("mopt.presets")
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _preset(name: str) -> Recipe:
    presets = preset_files()
    if name not in presets:
        raise unknown_name("recipe", name, presets, "mopt recipes list")
    return Recipe.from_toml(presets[name].read_bytes(), source=f"preset {name}")


def _text(value: Any, key: str, source: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{source}: {key} is {quote(value)}, expected text", code="bad-recipe")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False)
