"""What a pass is tested with: a Case, and the helpers that run and compare it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mopt.frontend import capture
from mopt.pass_base import Pass, PassContext
from mopt.pipeline import Pipeline, Step
from mopt.program import Program
from mopt.quality import drift
from mopt.registry import make_pass


@dataclass(frozen=True)
class Sample:
    """A module with inputs it can be captured with; ``inputs`` are positional or by keyword."""

    module: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    dynamic_shapes: Any = None

    def capture(self) -> Program:
        """The module as a Program."""
        return capture(self.module, self.inputs, self.dynamic_shapes)


@dataclass(frozen=True)
class Case:
    """One input of a pass and what the pass must do with it.

    ``source`` is a Sample, a Program or a function that makes either; ``options`` are the pass's.
    ``changed`` is what the pass must claim, and ``skipped`` a part of the reason of some site it
    must decline. ``tolerance`` bounds the largest difference of any output relative to that
    output's largest magnitude: required for a lossy pass that changes something, optional (and then
    tighter than the pass's own bound) for a rounding one. ``calibration``, or the function that
    makes it, and ``context`` fill the PassContext.
    """

    name: str
    source: Any
    changed: bool
    options: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""
    tolerance: float | None = None
    calibration: Any = None
    context: dict[str, Any] = field(default_factory=dict)

    def program(self) -> Program:
        """A freshly captured Program (the same one again if the source is a Program)."""
        source = self.source() if callable(self.source) else self.source
        return source.capture() if isinstance(source, Sample) else source

    def pass_context(self) -> PassContext:
        """The context the pass runs in."""
        data = self.calibration() if callable(self.calibration) else self.calibration
        return PassContext(**{"calibration": data, **self.context})


@dataclass
class Outcome:
    """A case and what came of it; every part is computed once, when it is first asked for."""

    pass_name: str
    case: Case

    @cached_property
    def one(self) -> Pass:
        """The pass with the case's options."""
        return make_pass(self.pass_name, self.case.options)

    @cached_property
    def original(self) -> Program:
        """The program before the pass."""
        return self.case.program()

    @cached_property
    def before(self) -> Snapshot:
        """What the original was like before the pass ran."""
        return Snapshot.of(self.original)

    @cached_property
    def result(self) -> Program:
        """The program after the pass."""
        assert self.before is not None  # taken before anything runs
        return self.run_on(self.original)

    @property
    def step(self) -> Step:
        """What the pipeline recorded."""
        return self.result.steps[-1]

    def run_on(self, program: Program) -> Program:
        """Another run of the same pass."""
        return Pipeline([self.one]).run(program, self.case.pass_context())

    def golden_text(self) -> str:
        """The claim, the sites skipped and the program's text as a difference, for a reader."""
        lines = [f"changed: {str(self.step.changed).lower()}"]
        lines += [f"skipped {_module_of(s.site)}: {s.reason}" for s in self.step.skipped]
        if self.step.changed:
            old, new = self.original.text().splitlines(), self.result.text().splitlines()
            changes = list(difflib.unified_diff(old, new, n=10_000, lineterm=""))[3:]
            lines += ["", *(changes or [f" {line}" for line in new])]
        return "\n".join(lines) + "\n"


def _module_of(site: str) -> str:
    """A site without its source line, which differs between machines and edits."""
    return ", ".join(part for part in site.split(", ") if ".py:" not in part) or "at the top"


@dataclass(frozen=True)
class Snapshot:
    """A program's text and a copy of its weights."""

    text: str
    weights: dict[str, Tensor]

    @staticmethod
    def of(program: Program) -> Snapshot:
        """Everything a pass must leave alone."""
        weights = {
            f"{path}/{name}": tensor.clone()
            for path, part in program.parts().items()
            for name, tensor in part.weights().items()
        }
        return Snapshot(program.text(), weights)

    def differences(self, program: Program) -> list[str]:
        """What is no longer as it was."""
        now = Snapshot.of(program)
        found = [] if now.text == self.text else ["graph text"]
        found += [f"weight {name}" for name in sorted(set(self.weights) ^ set(now.weights))]
        for name in set(self.weights) & set(now.weights):
            if not same_bits(self.weights[name], now.weights[name]):
                found.append(f"weight {name}")
        return found


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit, the sign of zero included.

    Any NaN counts as equal to any other: their payloads are not defined.
    """
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not (left.is_floating_point() or left.is_complex()):
        return torch.equal(left, right)
    left, right = left.detach(), right.detach()
    if left.is_complex():
        left, right = torch.view_as_real(left.resolve_conj()), torch.view_as_real(right)
    both_nan = torch.isnan(left) & torch.isnan(right)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    equal = left.contiguous().view(width) == right.contiguous().view(width)
    return bool((equal | both_nan).all())


def assert_same(expected: list[Any], found: list[Any], what: str) -> None:
    """Fail unless both lists of outputs are equal bit for bit."""
    assert len(expected) == len(found), f"{what}: {len(found)} outputs, expected {len(expected)}"
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        if isinstance(left, Tensor):
            assert same_bits(left, right), f"{what}: output {index} differs: {left} -> {right}"
        else:
            assert left == right, f"{what}: output {index} is {right!r}, expected {left!r}"


def assert_near(expected: list[Any], found: list[Any], *, tolerance: float, what: str) -> None:
    """Fail when an output differs by more than ``tolerance`` of its own largest magnitude.

    There is no default: the caller states a bound and where it comes from.
    """
    assert len(expected) == len(found), f"{what}: {len(found)} outputs, expected {len(expected)}"
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(left, Tensor):
            assert left == right, f"{what}: output {index} is {right!r}, expected {left!r}"
            continue
        assert left.dtype == right.dtype, f"{what}: output {index} became {right.dtype}"
        moved = drift([left], [right]).relative
        assert moved <= tolerance, f"{what}: output {index} moved by {moved:.2e} > {tolerance:.0e}"


def other_inputs(program: Program, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs like the program's: the same shapes and value ranges, other values.

    Floating-point elements are shuffled and scaled by up to a quarter, integers shuffled; boolean
    masks stay, since a shuffled mask may leave a row with nothing to attend to.
    """
    generator = torch.Generator().manual_seed(seed)

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == torch.bool or value.numel() == 0:
            return value
        order = torch.randperm(value.numel(), generator=generator)
        mixed = value.reshape(-1)[order].reshape(value.shape)
        if not value.is_floating_point():
            return mixed
        noise = torch.rand(value.shape, generator=generator) * 0.25 + 0.75
        return mixed * noise.to(value.dtype)

    return pytree.tree_map(change, (program.args, program.kwargs))


def grown_inputs(program: Program, times: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The program's inputs with every dynamic dimension repeated, or None if none is dynamic."""
    holders = [node for node in program.graph.nodes if node.op == "placeholder"]
    flat = program.flat_inputs(program.args, program.kwargs)
    grown, found = [], False
    for node, value in zip(holders, flat, strict=True):
        if isinstance(value, Tensor):
            sizes = node.meta["val"].shape
            repeats = [times if isinstance(size, torch.SymInt) else 1 for size in sizes]
            found = found or any(r > 1 for r in repeats)
            value = value.repeat(repeats) if repeats else value
        grown.append(value)
    if not found:
        return None
    args, kwargs = pytree.tree_unflatten(grown, program.graph_module._in_spec)
    return args, kwargs


def outputs(program: Callable[..., Any] | Program, args: Any, kwargs: Any) -> list[Any]:
    """The flat outputs of a program or a module, without gradients."""
    run = program.run if isinstance(program, Program) else program
    with torch.no_grad():
        return pytree.tree_leaves(run(*args, **kwargs))
