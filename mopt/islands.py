"""Partial capture: Programs for the largest submodules that export, eager code around them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from mopt.errors import CaptureError, InputError, first_line
from mopt.frontend import export_program, shorten_reason, user_site
from mopt.program import Coverage, Outside, Program
from mopt.signature import Signature

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class IslandProgram(Program):
    """A model whose captured parts are Programs, called from the user's own eager code.

    ``module`` is a copy of the user's model that shares its weights; at the path of each part it
    calls that part's graph when the inputs have the captured shapes, and the original otherwise.
    """

    module: nn.Module = field(default_factory=nn.Module)
    islands: dict[str, Program] = field(default_factory=dict)
    eager: nn.Module = field(default_factory=nn.Module)

    def parts(self) -> dict[str, Program]:
        """The captured parts by module path."""
        return dict(self.islands)

    def copy(self) -> IslandProgram:
        """A program with its own graphs that shares every weight with this one."""
        return self.with_parts({path: part.copy() for path, part in self.islands.items()})

    def with_parts(self, parts: dict[str, Program]) -> IslandProgram:
        """The same model with other graphs at the captured paths."""
        calls = {path: part.graph_module for path, part in parts.items()}
        return IslandProgram(
            graph_module=self.graph_module,
            args=self.args,
            kwargs=self.kwargs,
            name=self.name,
            coverage=self.coverage,
            plan=copy.deepcopy(self.plan),
            steps=list(self.steps),
            module=with_calls(self.eager, calls, self.islands),
            islands=parts,
            eager=self.eager,
        )

    def refresh(self) -> None:
        """Make every part run its edited graph."""
        for part in self.islands.values():
            part.refresh()

    def verify(self) -> None:
        """Check every part's graph."""
        for part in self.islands.values():
            part.verify()

    def size_bytes(self) -> int:
        """Bytes of the captured weights and of the parameters that stayed eager."""
        captured = sum(part.size_bytes() for part in self.islands.values())
        paths = tuple(self.islands)
        return captured + sum(
            t.numel() * t.element_size()
            for name, t in self.eager.named_parameters()
            if not any(name == p or name.startswith(f"{p}.") for p in paths)
        )

    def parameter_count(self) -> int:
        """Elements of the captured weights."""
        return sum(part.parameter_count() for part in self.islands.values())

    def flops(self) -> int:
        """FLOPs of the captured parts."""
        return sum(part.flops() for part in self.islands.values())

    def text(self) -> str:
        """The text of each part under its path."""
        return "".join(f"[{path}]\n{part.text()}" for path, part in self.islands.items())

    def fingerprint(self) -> str:
        """A hash over the parts."""
        return "-".join(part.fingerprint()[:16] for part in self.islands.values())

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The user's model with its captured parts in place."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def calls_of(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Call]:
        """The inputs of every call of the captured part at ``path`` in one run of the model."""
        part = self.module.get_submodule(path)
        assert isinstance(part, CapturedCall)
        calls: list[_Call] = []

        def remember(_module: nn.Module, a: Any, k: Any) -> None:
            calls.append(_canonical(part.original, tuple(a), dict(k)))

        handle = part.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            with torch.random.fork_rng(devices=[]):
                self.run(*args, **kwargs)
        finally:
            handle.remove()
        return calls


class CapturedCall(nn.Module):
    """Calls ``run`` for the inputs it ``accepts``, the original module for any other."""

    def __init__(
        self,
        run: Callable[..., Any],
        original: nn.Module,
        accepts: Callable[[tuple[Any, ...], dict[str, Any]], bool],
    ) -> None:
        super().__init__()
        self.run = run
        self.original = original
        self.accepts = accepts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The part's output, whichever way it is computed."""
        args, kwargs = _canonical(self.original, args, kwargs)
        chosen = self.run if self.accepts(args, kwargs) else self.original
        return chosen(*args, **kwargs)


def with_calls(
    eager: nn.Module, calls: dict[str, Callable[..., Any]], examples: dict[str, Program]
) -> nn.Module:
    """A copy of ``eager`` that shares its tensors and runs ``calls`` at the given paths."""

    def accepts(example: Program) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
        expected = _signature((example.args, example.kwargs))
        return lambda args, kwargs: _signature((args, kwargs)) == expected

    return _replace(eager, calls, {path: accepts(examples[path]) for path in calls})


def with_lowered_calls(
    eager: nn.Module, calls: dict[str, Callable[..., Any]], signatures: dict[str, Signature]
) -> nn.Module:
    """As :func:`with_calls`, for lowered parts that state what they take as signatures."""

    def accepts(
        signature: Signature,
    ) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
        def check(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
            try:
                signature.flatten(args, kwargs)
            except InputError:
                return False
            return True

        return check

    return _replace(eager, calls, {path: accepts(signatures[path]) for path in calls})


def _replace(
    eager: nn.Module,
    calls: dict[str, Callable[..., Any]],
    accepts: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], bool]],
) -> nn.Module:
    memo: dict[int, Any] = {id(t): t for t in [*eager.parameters(), *eager.buffers()]}
    module = copy.deepcopy(eager, memo)
    module.eval()
    for path, run in calls.items():
        wrapped = CapturedCall(run, module.get_submodule(path), accepts[path])
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, wrapped)
    return module


def capture_islands(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], whole_error: Exception
) -> IslandProgram:
    """Capture the largest submodules that export; raise CaptureError if there is none."""
    calls = _record_calls(model, args, kwargs)
    flops = _module_flops(model, args, kwargs)
    parts: dict[str, Program] = {}
    outside: list[Outside] = []
    _descend(model, "", calls, parts, outside, flops, whole_error)
    if not parts:
        raise CaptureError(
            f"no part of the model can be captured: {shorten_reason(whole_error)}",
            code="capture-failed",
            site=user_site(whole_error),
            hint="torch.export.draft_export(model, example_inputs) lists every obstacle",
        ) from whole_error
    total_parameters = sum(p.numel() for p in model.parameters()) or 1
    total_flops = flops.get("", 0) or 1
    inside = sum(
        p.numel() for n, p in model.named_parameters()
        if any(n == path or n.startswith(f"{path}.") for path in parts)
    )  # fmt: skip
    inside_flops = sum(flops.get(path, 0) for path in parts)
    coverage = Coverage(
        parameters=inside / total_parameters,
        flops=min(1.0, inside_flops / total_flops),
        outside=tuple(outside),
    )
    first = next(iter(parts.values()))
    base = IslandProgram(
        graph_module=first.graph_module, args=args, kwargs=kwargs, name=type(model).__name__,
        coverage=coverage, islands=parts, eager=model,
    )  # fmt: skip
    return base.with_parts(parts)


def _descend(
    module: nn.Module,
    path: str,
    calls: dict[str, list[_Call]],
    parts: dict[str, Program],
    outside: list[Outside],
    flops: dict[str, int],
    error: Exception,
) -> None:
    """Try the children of a module that did not export, then theirs."""
    own = sum(p.numel() for p in module.parameters(recurse=False))
    outside.append(
        Outside(path, shorten_reason(error), user_site(error) or _source(module), own, 0)
    )
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if not any(True for _ in child.parameters()):
            continue
        if child_path not in calls:  # a container such as ModuleList, or a module never called
            if any(True for _ in child.children()):
                _descend_container(child, child_path, calls, parts, outside, flops, error)
            continue
        child_args, child_kwargs = _canonical(child, *calls[child_path][0])
        try:
            program = export_program(child, child_args, child_kwargs, None)
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as child_error:  # torch.export has no common base for what it raises
            if any(True for _ in child.children()):
                _descend(child, child_path, calls, parts, outside, flops, child_error)
            else:
                count = sum(p.numel() for p in child.parameters())
                outside.append(
                    Outside(child_path, shorten_reason(child_error),
                            user_site(child_error) or _source(child), count,
                            flops.get(child_path, 0))
                )  # fmt: skip
            continue
        program.path = child_path
        program.name = type(child).__name__
        parts[child_path] = program


def _descend_container(
    module: nn.Module,
    path: str,
    calls: dict[str, list[_Call]],
    parts: dict[str, Program],
    outside: list[Outside],
    flops: dict[str, int],
    error: Exception,
) -> None:
    before = len(outside)
    _descend(module, path, calls, parts, outside, flops, error)
    del outside[before]  # the container itself runs nothing


def _record_calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[_Call]]:
    calls: dict[str, list[_Call]] = {}
    handles = []
    for path, module in model.named_modules():

        def record(_m: nn.Module, a: Any, k: Any, _path: str = path) -> None:
            calls.setdefault(_path, []).append((tuple(a), dict(k)))

        handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _module_flops(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, int]:
    """FLOPs by module path, the whole model under the empty path."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), counter:
        model(*args, **kwargs)
    prefix = type(model).__name__
    result: dict[str, int] = {}
    for name, counts in counter.get_flop_counts().items():
        total = sum(counts.values())
        if name in ("Global", prefix):
            result[""] = max(result.get("", 0), total)
        else:
            result[name.removeprefix(f"{prefix}.")] = total
    return result


def _canonical(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with absent and None arguments left out, keyword order as in the signature."""
    try:
        order = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return args, kwargs
    given = {k: v for k, v in kwargs.items() if v is not None}
    ranked = sorted(given, key=lambda k: order.index(k) if k in order else len(order))
    return args, {k: given[k] for k in ranked}


def _signature(call: _Call) -> tuple[Any, ...]:
    leaves, spec = pytree.tree_flatten(call)
    shapes = tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    )
    return (str(spec), *shapes)


def _source(module: nn.Module) -> str:
    try:
        file = inspect.getsourcefile(type(module))
        return f"{file}:{inspect.getsourcelines(type(module))[1]}"
    except (OSError, TypeError):
        return first_line(TypeError(type(module).__name__))
