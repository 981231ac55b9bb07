"""What all commands share: the options they have in common, and how a group finds its commands."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import click

from mopt.cli._output import Output
from mopt.errors import unknown_name

_NOT_COMMANDS = ("__init__", "main")
F = TypeVar("F", bound=Callable[..., Any])


def option(*flags: str, **settings: Any) -> Callable[[F], F]:
    """``click.option`` that is also read from ``MOPT_<NAME>`` and says so in the help."""
    settings.setdefault("envvar", _variable(flags))
    settings.setdefault("show_envvar", True)
    return click.option(*flags, **settings)


def _variable(flags: tuple[str, ...]) -> str:
    longest = next(flag for flag in flags if flag.startswith("--"))
    return "MOPT_" + longest.removeprefix("--").replace("-", "_").upper()


def _remember(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        given = ctx.get_parameter_source(parameter.name or "")
        if given is not click.core.ParameterSource.DEFAULT:
            out = ctx.ensure_object(Output)
            setattr(out, name, value)

    return callback


def _common(*flags: str, **settings: Any) -> click.Option:
    return click.Option(
        list(flags), expose_value=False, is_eager=True, envvar=_variable(flags), **settings
    )


def _common_options() -> list[click.Parameter]:
    return [
        _common(
            "-v", "--verbose", count=True, callback=_remember("verbose"),
            help="Say more: a line per pass; twice: also what libraries log.",
        ),
        _common(
            "-q", "--quiet", is_flag=True, callback=_remember("quiet"),
            help="Print only the last line.",
        ),
        _common(
            "--json", is_flag=True, callback=_remember("as_json"),
            help="Print one JSON document on stdout and nothing else.",
        ),
        _common(
            "--color", type=click.Choice(["auto", "always", "never"]), default="auto",
            callback=_remember("color"), help="When to use colour.",
        ),
    ]  # fmt: skip


class Command(click.Command):
    """A command with the common options; its help is the docstring of its file."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.extend(_common_options())


class Group(click.Group):
    """Commands under a noun: ``mopt passes list``."""

    command_class = Command

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.extend(_common_options())

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names; UsageError with the nearest one."""
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise unknown_name("command", args[0], known, f"{ctx.command_path} --help")
        return super().resolve_command(ctx, args)


class FolderGroup(Group):
    """The commands are the files beside this one: each exposes ``command``.

    Listing them reads their docstrings and imports nothing, so help stays instant and adding a
    command means adding its file.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the files that do not start with an underscore."""
        stems = (path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
        return sorted(stem.replace("_", "-") for stem in stems if stem not in _NOT_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the one file asked for."""
        if cmd_name not in self.list_commands(ctx):
            return None
        found: click.Command = import_module(f"{__package__}.{cmd_name.replace('-', '_')}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in ``mopt --help``."""
        rows = [(name, short_help(name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def short_help(command: str) -> str:
    """The first line of a command's file."""
    path = Path(__file__).parent / f"{command.replace('-', '_')}.py"
    doc = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    return doc.partition("\n")[0].rstrip(".")
