"""``mopt.toml``: which models the gate builds, and how much worse they may get.

    [defaults]
    target = "host"
    budget = ["quality>=0.99"]

    [models.net]
    model = "net.py:factory"
    recipe = "int8-dynamic"

    [check]
    baseline = "mopt-baseline.json"

    [check.limits]
    size = { increase = "1 %" }
    coverage = { level = "warn", decrease = "0.5 pt" }

    [check.limits.net]
    latency-measured = { level = "off" }

The file names code that is run, and is trusted like code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mopt.errors import InputError, unknown_name
from mopt.gate import DEFAULT_LIMITS, ERROR, OFF, WARN, Limit
from mopt.toml_files import TomlFile, read_toml

NAME = "mopt.toml"
BASELINE = "mopt-baseline.json"
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|pt)\s*")


@dataclass(frozen=True)
class GateModel:
    """One model of the gate, with the options of ``mopt compile``."""

    name: str
    model: str
    target: str = "host"
    backend: str = "onnx"
    recipe: str | None = None
    budget: tuple[str, ...] = ()
    calib: str | None = None
    eval: str | None = None
    seed: int = 0
    limits: Mapping[str, Limit] = field(default_factory=dict)


@dataclass(frozen=True)
class GateConfig:
    """A read ``mopt.toml``. ``folder`` is where it lies: names of files in it start there."""

    folder: Path
    models: tuple[GateModel, ...]
    baseline: str = BASELINE
    fail_on: str = ERROR


_TEXTS = ("target", "backend", "recipe", "calib", "eval")


def read_config(path: str | Path) -> GateConfig:
    """Read the file. Raises InputError with file and line, or what reading TOML does."""
    if not Path(path).is_file():
        raise InputError(
            f"no file {str(path)!r}", code="no-gate-config", hint="mopt init writes one"
        )
    document = read_toml(path)
    data = document.data
    _known(document, data, ("defaults", "models", "check"))
    defaults = _options(document, data.get("defaults", {}), "defaults")
    check = data.get("check", {})
    _known(document, check, ("baseline", "fail-on", "limits"), "check")
    tables = data.get("models", {})
    if not isinstance(tables, dict) or not tables:
        raise InputError(
            f"{document.name} names no models",
            code="no-gate-models",
            hint='add [models.NAME] with model = "net.py:factory"',
        )
    common, own = _limits(document, check.get("limits", {}), tables)
    models = []
    for name, settings in tables.items():
        options = {**defaults, **_options(document, settings, "models", name)}
        if "model" not in options:
            raise _error(document, f"[models.{name}] has no model", "models", name)
        models.append(GateModel(name=name, **options, limits={**common, **own.get(name, {})}))
    config = GateConfig(Path(path).resolve().parent, tuple(models))
    for key, text in (("baseline", "baseline"), ("fail-on", "fail_on")):
        if key in check:
            if not isinstance(check[key], str):
                raise _error(document, f"{key} is no text", "check", key)
            config = replace(config, **{text: check[key]})
    if config.fail_on not in (ERROR, WARN, "never"):
        raise _error(document, "fail-on is error, warn or never", "check", "fail-on")
    return config


def _error(document: TomlFile, message: str, *where: str) -> InputError:
    return InputError(f"{document.name}: {message}", code="gate-config", site=document.site(*where))


def _known(document: TomlFile, table: Any, names: Iterable[str], *where: str) -> None:
    if not isinstance(table, dict):
        raise _error(document, f"{'.'.join(where)} is no table", *where)
    for key in table:
        if key not in names:
            error = unknown_name("setting", key, names, "docs/ci.md")
            error.site = document.site(*where, key)
            raise error


def _options(document: TomlFile, table: Any, *where: str) -> dict[str, Any]:
    names = [*_TEXTS, "budget", "seed"] + (["model"] if where[0] == "models" else [])
    _known(document, table, names, *where)
    found = dict(table)
    for key, value in table.items():
        if key == "budget":
            texts = [value] if isinstance(value, str) else value
            if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
                raise _error(document, "budget is a list of texts", *where, key)
            found[key] = tuple(texts)
        elif key == "seed":
            if not isinstance(value, int) or isinstance(value, bool):
                raise _error(document, "seed is a whole number", *where, key)
        elif not isinstance(value, str):
            raise _error(document, f"{key} is a text", *where, key)
    return found


def _limits(
    document: TomlFile, table: Any, models: Iterable[str]
) -> tuple[dict[str, Limit], dict[str, dict[str, Limit]]]:
    """Limits of every model, and those of single ones."""
    _known(document, table, [*DEFAULT_LIMITS, *models], "check", "limits")
    common = {
        key: _limit(document, key, value, "check", "limits", key)
        for key, value in table.items() if key in DEFAULT_LIMITS
    }  # fmt: skip
    own: dict[str, dict[str, Limit]] = {}
    for name in models:
        inside = table.get(name, {}) if name not in DEFAULT_LIMITS else {}
        _known(document, inside, DEFAULT_LIMITS, "check", "limits", name)
        own[name] = {
            key: _limit(document, key, value, "check", "limits", name, key)
            for key, value in inside.items()
        }
    return common, own


def _limit(document: TomlFile, metric: str, table: Any, *where: str) -> Limit:
    _known(document, table, ("level", "increase", "decrease"), *where)
    limit = DEFAULT_LIMITS[metric]
    level = table.get("level", limit.level)
    if level not in (ERROR, WARN, OFF):
        raise _error(document, "level is error, warn or off", *where)
    limit = replace(limit, level=level)
    for key in ("increase", "decrease"):
        if key not in table:
            continue
        found = _AMOUNT.fullmatch(table[key]) if isinstance(table[key], str) else None
        if found is None:
            raise _error(document, f"{key} is an amount such as '1 %' or '0.5 pt'", *where)
        limit = replace(limit, change=float(found[1]) / 100, absolute=found[2] == "pt")
    return limit
