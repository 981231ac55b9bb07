"""Pages that are made from the code when the site is built (``hooks`` in mkdocs.yml).

Nothing here is written twice: the first page is the README, passes, formats, devices, recipes and
commands are described by their own docstrings, and every error code is found where it is raised.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("mopt", "passes", "backends", "cost_models", "cli", "models")
MARK = "<!-- every error code, made by docs/hooks.py -->"
# Codes that a class or a function gives, where no call names them.
_GIVEN = {
    "budget-not-met": "the measured result is outside the budget",
    "internal": "",
    "usage": "",
}


@dataclass(frozen=True)
class Raised:
    """One place where an error is raised: what it says and advises, blanks for what varies."""

    code: str
    message: str
    hint: str


def error_codes() -> dict[str, list[Raised]]:
    """Every code with the places that raise it, by code."""
    found: dict[str, list[Raised]] = {code: [Raised(code, text, "")] for code, text in
                                      _GIVEN.items()}  # fmt: skip
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            constants = dict(_constants(tree))
            for node in ast.walk(tree):
                for one in _raised(node, constants) if isinstance(node, ast.Call) else ():
                    found.setdefault(one.code, []).append(one)
    return {code: [one for one in places if one.message] for code, places in sorted(found.items())}


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                    yield target.id, node.value.value


def _raised(call: ast.Call, constants: dict[str, str]) -> Iterator[Raised]:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    keywords = {word.arg: word.value for word in call.keywords}
    if name == "unknown_name" and call.args and isinstance(call.args[0], ast.Constant):
        kind = str(call.args[0].value)
        yield Raised(f"unknown-{kind.replace(' ', '-')}", f"no {kind} is called ...",
                     "the nearest name that is known, and where all are listed")  # fmt: skip
        return
    code: ast.expr | None = keywords.get("code")
    if code is None and name in ("error", "refuse") and len(call.args) >= 3:
        code = call.args[2]
    for value in _values(code, constants):
        message = call.args[1] if keywords.get("code") is None else next(iter(call.args), None)
        yield Raised(value, _template(message), _template(keywords.get("hint")))


def _values(code: ast.expr | None, constants: dict[str, str]) -> Iterator[str]:
    if isinstance(code, ast.IfExp):
        yield from _values(code.body, constants)
        yield from _values(code.orelse, constants)
        return
    text = code.value if isinstance(code, ast.Constant) else constants.get(getattr(code, "id", ""))
    if isinstance(text, str) and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text):
        yield text


def _template(node: ast.expr | None) -> str:
    """A text with ``...`` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value or "")
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        return "".join(map(str, parts))
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    if isinstance(node, ast.IfExp):
        return _template(node.body) or _template(node.orelse)
    return ""


def troubles() -> str:
    """A heading for every code, with what it says and what helps."""
    lines = []
    for code, places in error_codes().items():
        lines += [f"### {code}", ""]
        told: dict[str, str] = {}
        for one in places:
            told.setdefault(_plain(one.message), _plain(one.hint))
        for message, hint in told.items():
            lines += [f"- {message}" + (f"<br>*{hint}*" if hint else "")]
        lines += ["" if told else "The text says what was expected and what was found.", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"([*_<>`\[\]|#])", r"\\\1", text)


# ---- pages from docstrings


def passes_page() -> str:
    """Every pass with its docstring and its options."""
    import dataclasses
    import inspect

    from mopt.registry import find_pass, list_passes

    lines = ["# Passes", "", "Each is used in a [recipe](recipes.md). Made from the code.", ""]
    for name in sorted(list_passes()):
        cls = find_pass(name)
        doc = re.sub(r"^## ", "#### ", inspect.cleandoc(cls.__doc__ or ""), flags=re.MULTILINE)
        lines += [f"## {name}", "", doc, "", "| option | default | |", "|---|---|---|"]
        for spec in dataclasses.fields(cls):
            told = _plain(str(spec.metadata.get("help", "")))
            lines.append(f"| `{spec.name}` | `{spec.default!r}` | {told} |")
        lines.append("")
    return "\n".join(lines)


def formats_page() -> str:
    """Every family of formats with its names."""
    import inspect

    from mopt.formats.base import families

    lines = ["# Formats", "", "What a layer's weight may become. Made from the code.", ""]
    for family in families():
        lines += [f"## {family.__name__}", "", inspect.getdoc(family) or "", ""]
        lines += [", ".join(f"`{name}`" for name in family.names()), ""]
    return "\n".join(lines)


def devices_page() -> str:
    """Every device that comes with mopt."""
    from mopt.device import list_devices

    lines = ["# Devices that come with mopt", "", "`mopt devices show NAME` prints every number of "
             "one with its source. Made from the code.", "", "| name | what it is | backends |",
             "|---|---|---|"]  # fmt: skip
    for device in list_devices():
        lines.append(f"| `{device.id}` | {_plain(device.name)} | {', '.join(device.backends)} |")
    return "\n".join([*lines, ""])


def commands_page() -> str:
    """The help of every command."""
    import click

    from mopt.cli.main import cli

    lines = ["# Commands", "", "What `--help` prints. Made from the code.", ""]

    def tell(command: click.Command, path: str, context: click.Context | None) -> None:
        own = click.Context(command, info_name=path.split()[-1], parent=context)
        lines.extend([f"## {path}", "", "```text", command.get_help(own), "```", ""])
        if isinstance(command, click.Group):
            for name in command.list_commands(own):
                below = command.get_command(own, name)
                assert below is not None
                tell(below, f"{path} {name}", own)

    tell(cli, "mopt", None)
    return "\n".join(lines)


def python_page() -> str:
    """The public names with their signatures and docstrings."""
    import inspect

    import mopt

    lines = ["# Python", "", "Made from the code.", ""]
    for name in sorted(mopt.__all__):
        value = getattr(mopt, name)
        if not callable(value):
            continue
        try:
            signature = f"{name}{inspect.signature(value)}"
        except (TypeError, ValueError):
            signature = name
        lines += [f"## {name}", "", "```text", signature, "```", "",
                  "```text", inspect.getdoc(value) or "", "```", ""]  # fmt: skip
    return "\n".join(lines)


def first_page() -> str:
    """The README with its links as the site has them."""
    return (ROOT / "README.md").read_text().replace("](docs/", "](")


PAGES = {
    "index.md": first_page, "passes.md": passes_page, "formats.md": formats_page,
    "devices_list.md": devices_page, "commands.md": commands_page, "python.md": python_page,
}  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from the code."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the error codes where their page has its mark."""
    return markdown.replace(MARK, troubles()) if MARK in markdown else markdown
