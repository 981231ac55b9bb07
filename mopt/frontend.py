"""Capture: from a user's module to a Program, through ``torch.export``.

When the whole model does not export, capture goes down the module tree: the largest submodules
that do export become Programs, the rest stays eager and calls them (``mopt/islands.py``).
"""

from __future__ import annotations

import inspect
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from mopt.effects import written_nodes
from mopt.errors import CaptureError, InputError, first_line, quote
from mopt.program import Coverage, Program
from mopt.shapes import trust_shapes

_TORCH_ROOT = str(Path(torch.__file__).parent)
_MOPT_ROOT = str(Path(__file__).parent)


def capture(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    dynamic_shapes: Any = None,
    *,
    require_coverage: float = 0.0,
) -> Program:
    """The model as a Program (or, in parts, an ``IslandProgram``); the model is left unchanged.

    ``example_inputs`` is a tuple of positional inputs or a mapping of keyword inputs;
    ``dynamic_shapes`` is what ``torch.export.export`` takes. The model is captured in eval mode
    and its training flag is put back. Raises InputError for inputs the model cannot run on, and
    CaptureError when less than ``require_coverage`` (0 to 1) of the parameters or of the FLOPs
    could be captured.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"expected a torch.nn.Module, found {type(model).__name__}",
            code="not-a-module",
            hint="pass the module itself, not its name, class or state dict",
        )
    args, kwargs = normalize_inputs(example_inputs)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b._version, b.clone()) for b in model.buffers() if not b.is_inference()]
    model.eval()
    try:
        check_runs(model, args, kwargs)
        program = _capture_whole_or_parts(model, args, kwargs, dynamic_shapes)
    finally:
        for module, training in modes:
            module.training = training
        for buffer, version, content in buffers:
            if buffer._version != version:  # forward counts calls, or the like
                buffer.copy_(content)
    _require(program.coverage, require_coverage)
    return program


def normalize_inputs(
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs from either form a user may give."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise InputError(
        "example inputs must be a tuple or a mapping, "
        f"found {quote(type(example_inputs).__name__)}",
        code="bad-example-inputs",
        hint="pass (tensor,) for one positional input or {'name': tensor} for keyword inputs",
    )


def export_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Program:
    """The whole model through ``torch.export``; raises whatever export raises."""
    traced_args, traced_kwargs = _grow_ones(model, args, kwargs, dynamic_shapes)
    with _quiet(), torch.no_grad():
        exported = torch.export.export(
            model, traced_args, traced_kwargs or None, dynamic_shapes=dynamic_shapes, strict=False
        )
        module = exported.module(check_guards=False)
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.recompile()
    trust_shapes(module)
    program = Program(module, args, kwargs, dynamic_shapes, name=type(model).__name__)
    _refuse_written_weights(program)
    return program


def _refuse_written_weights(program: Program) -> None:
    """Raise CaptureError if running the graph writes to its weights.

    The graph alone tells which weights a call may write to; whether it does, a run tells.
    """
    suspects = {
        str(node.target): program.weight(node)
        for node in written_nodes(program)
        if node.op == "get_attr"
    }
    if not suspects:
        return
    kept = {name: (tensor._version, tensor.clone()) for name, tensor in suspects.items()}
    with torch.random.fork_rng(devices=[]):
        program.run(*program.args, **program.kwargs)
    written = []
    for name, (version, content) in kept.items():
        if suspects[name]._version != version:
            written.append(name)
            suspects[name].copy_(content)
    if written:
        names = ", ".join(sorted(written)[:3])
        raise CaptureError(
            f"forward writes to buffers of the model ({names}), which an artifact cannot keep",
            code="buffer-mutation",
            hint="return the new state from forward, or freeze it before compiling",
        )


def _capture_whole_or_parts(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Program:
    try:
        return _export_with_or_without_cache(model, args, kwargs, dynamic_shapes)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # torch.export has no common base for what it raises
        from mopt.islands import capture_islands

        _reject_bad_dynamic_shapes(error)
        return capture_islands(model, args, kwargs, error)


def _export_with_or_without_cache(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Program:
    """Export; if that fails and the model returns a key-value cache by default, export without it.

    Models in the manner of Hugging Face say so in ``config.use_cache``; the cache is an object that
    a graph cannot return.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    try:
        return export_program(model, args, kwargs, dynamic_shapes)
    except Exception:  # torch.export has no common base for what it raises
        if not caching:
            raise
    try:
        for config in caching:
            config.use_cache = False
        return export_program(model, args, kwargs, dynamic_shapes)
    finally:
        for config in caching:
            config.use_cache = True


def _reject_bad_dynamic_shapes(error: Exception) -> None:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__ != "UserError" or not lines:
        return
    if lines[0].startswith("Constraints violated"):
        reason = next((line[2:] for line in lines if line.startswith("- ")), lines[0])
        start = lines.index("Suggested fixes:") + 1 if "Suggested fixes:" in lines else len(lines)
        fixes = [line for line in lines[start:] if " = " in line]
        raise InputError(
            f"dynamic_shapes promise sizes the model does not take: {reason}",
            code="bad-dynamic-shapes",
            hint="; ".join(fixes) or "leave that dimension out of dynamic_shapes",
        ) from error
    if "dynamic_shapes" in lines[0]:
        raise InputError(
            f"dynamic_shapes do not fit the inputs: {shorten_reason(error)}",
            code="bad-dynamic-shapes",
            hint="use the form of torch.export.export: {'input': {0: Dim('batch')}}",
        ) from error


def check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the model once on its example inputs, without gradients.

    Raises InputError that names what is wrong: ``non-finite-input``, ``non-finite-weight``, or
    ``model-does-not-run`` with the shapes and the model's own error.
    """
    for tensor in pytree.tree_leaves((args, kwargs)):
        is_number = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        if is_number and not bool(torch.isfinite(tensor).all()):
            raise InputError("an example input holds NaN or infinity", code="non-finite-input")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise InputError(
                f"weight {name!r} holds NaN",
                code="non-finite-weight",
                hint="load a sound checkpoint; a compressed NaN would poison the whole layer",
            )
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*args, **kwargs)
    except Exception as error:  # the user's forward may raise anything
        shapes = [tuple(t.shape) for t in pytree.tree_leaves((args, kwargs))
                  if isinstance(t, torch.Tensor)]  # fmt: skip
        raise InputError(
            f"the model does not run on its example inputs of shapes {shapes}: "
            f"{type(error).__name__}: {first_line(error)}",
            code="model-does-not-run",
            site=user_site(error),
            hint="call model(*example_inputs) yourself first",
        ) from error


def _require(coverage: Coverage, required: float) -> None:
    share = min(coverage.parameters, coverage.flops)
    if share < required or (required >= 1 and not coverage.is_whole):
        worst = max(coverage.outside, key=lambda part: (part.flops, part.parameters))
        raise CaptureError(
            f"{share:.1%} of the model was captured, {required:.1%} are required; "
            f"outside: {worst.path or 'the top module'} ({worst.reason})",
            code="coverage",
            site=worst.source or None,
        )


def _grow_ones(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs whose dynamic dimensions of size 1 are doubled: export would fix a 1 for good."""
    if not dynamic_shapes:
        return args, kwargs
    names = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    positional = dict(zip(names, args, strict=False))

    def grow(value: Any, shape: Any) -> Any:
        if isinstance(value, torch.Tensor) and isinstance(shape, Mapping | tuple | list):
            dims = shape.items() if isinstance(shape, Mapping) else enumerate(shape)
            for dim, size in dims:
                is_fixed = size is None or isinstance(size, int) or size is Dim.STATIC
                if not is_fixed and value.shape[dim] == 1:
                    value = torch.cat([value, value], dim)
            return value
        if isinstance(value, Mapping) and isinstance(shape, Mapping):
            return type(value)({k: grow(v, shape.get(k)) for k, v in value.items()})  # type: ignore[call-arg]
        if isinstance(value, list | tuple) and isinstance(shape, list | tuple):
            return type(value)(grow(v, s) for v, s in zip(value, shape, strict=True))
        return value

    if isinstance(dynamic_shapes, Mapping):
        grown = {k: grow(v, dynamic_shapes.get(k)) for k, v in {**positional, **kwargs}.items()}
        head = list(positional)
        return (
            tuple(grown[name] for name in head) + args[len(head) :],
            {name: grown[name] for name in kwargs},
        )
    everything = [*args, *kwargs.values()]
    grown_list = [grow(v, s) for v, s in zip(everything, dynamic_shapes, strict=False)]
    grown_list += everything[len(grown_list) :]
    return tuple(grown_list[: len(args)]), dict(zip(kwargs, grown_list[len(args) :], strict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep export's log lines and deprecation warnings from the user, who cannot act on them.

    When export fails it also prints the graph so far to stderr; that text is taken out again.
    """
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._dynamo", "torch.fx")]
    levels = [logger.level for logger in loggers]
    printed, partial_graph = io.StringIO(), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            with redirect_stderr(printed):
                yield
        except Exception as error:
            partial_graph = f"{getattr(error, 'partial_fx_graph', '')}\n"
            raise
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            sys.stderr.write(printed.getvalue().replace(partial_graph, ""))


def shorten_reason(error: BaseException) -> str:
    """What torch said, reduced to what a user can act on."""
    name, line = type(error).__name__, first_line(error)
    known = {
        "GuardOnDataDependentSymNode": "a Python branch or loop depends on a tensor's value",
        "Unsupported": line,
    }
    return known.get(name, line if name in ("UserError", "CaptureError") else f"{name}: {line}")


def user_site(error: BaseException) -> str | None:
    """``file:line`` of the innermost frame of the user's own code in an error's traceback."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH_ROOT, _MOPT_ROOT, "<"))
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
