"""What must hold for every program, as one check that names the law that is broken."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.registry import make_pass
from tests.case import (
    Sample,
    Snapshot,
    assert_same,
    grown_inputs,
    other_inputs,
    outputs,
)
from tests.tiny import RmsNorm

EXACT = ("fold-constants", "remove-no-ops", "merge-duplicates")
ROUNDING = ("fold-batch-norm", "fold-norm-affine", "fold-scale")


def input_sets(program: Program) -> Iterator[tuple[tuple, dict]]:
    """The example inputs, others like them, and a larger batch."""
    yield program.args, program.kwargs
    yield other_inputs(program, seed=1)
    grown = grown_inputs(program, times=3)
    if grown is not None:
        yield grown


def reference(sample: Sample) -> list[Tensor] | None:
    """What the model computes in float64; None if that is not finite."""
    wide = copy.deepcopy(sample.module).double()
    for module in wide.modules():
        if isinstance(module, RmsNorm):
            module.compute = torch.float64
    inputs = [x.double() if x.is_floating_point() else x for x in sample.inputs]
    found = outputs(wide, inputs, {})
    return found if all(bool(t.isfinite().all()) for t in found) else None


def check_program(program: Program, sample: Sample) -> None:
    """A captured program computes what the module does, in the shapes it says."""
    for args, kwargs in input_sets(program):
        assert_same(outputs(sample.module, args, kwargs), outputs(program, args, kwargs), "capture")

    def visit(node: fx.Node, value: object) -> None:
        stated = node.meta.get("val")
        if isinstance(value, Tensor) and isinstance(stated, Tensor):
            assert value.dtype == stated.dtype, f"{node.name} is {value.dtype}"
            assert value.dim() == stated.dim(), f"{node.name} has {value.dim()} axes"
            sizes = zip(value.shape, stated.shape, strict=True)
            assert all(b == a for a, b in sizes if isinstance(b, int)), f"shape of {node.name}"

    program.interpret(visit, program.args, program.kwargs)


def check_exact(program: Program, name: str) -> Program:
    """An exact pass keeps every bit and the original, and has nothing left to do afterwards."""
    before = Snapshot.of(program)
    one = Pipeline([make_pass(name, {})])
    result = one.run(program)
    assert before.differences(program) == [], f"{name} changed the original"
    for args, kwargs in input_sets(program):
        assert_same(outputs(program, args, kwargs), outputs(result, args, kwargs), name)
    assert not one.run(result).steps[-1].changed, f"{name} has more to do the second time"
    assert one.run(program.copy()).fingerprint() == result.fingerprint(), f"{name} on a copy"
    return result


def check_rounding(program: Program, name: str, exact: list[Tensor]) -> Program:
    """A rounding pass stays as close to float64 as float32 was, but for a few more roundings.

    Four times the error the program had (the oracle of NNSmith's successors uses a fixed 1e-3),
    plus the error of summing in another order: 64 epsilons of the output's largest magnitude.
    """
    before = Snapshot.of(program)
    one = Pipeline([make_pass(name, {})])
    result = one.run(program)
    assert before.differences(program) == [], f"{name} changed the original"
    old = outputs(program, program.args, program.kwargs)
    new = outputs(result, program.args, program.kwargs)
    for index, (truth, was, now) in enumerate(zip(exact, old, new, strict=True)):
        if not truth.is_floating_point() or not truth.numel():
            assert_same([was], [now], name)
            continue
        error = float((was.double() - truth).abs().max())
        scale = float(truth.abs().max())
        bound = 4 * error + 64 * torch.finfo(was.dtype).eps * scale
        found = float((now.double() - truth).abs().max())
        assert found <= bound, f"{name}: output {index} is off by {found:.2e}, bound {bound:.2e}"
    assert not one.run(result).steps[-1].changed, f"{name} has more to do the second time"
    grown = grown_inputs(program, times=3)
    if grown is not None:
        shapes = [[t.shape for t in outputs(p, *grown)] for p in (program, result)]
        assert shapes[0] == shapes[1], f"{name} fixed a size"
    return result


def check_all(sample: Sample) -> bool:
    """Every law on one program; False if the program is of no use as a test."""
    exact = reference(sample)
    if exact is None:
        return False
    program = sample.capture()
    assert program.coverage.is_whole, program.coverage.outside
    check_program(program, sample)
    for name in EXACT:
        check_exact(program, name)
    current = program
    for name in EXACT:
        current = check_exact(current, name)
    for name in ROUNDING:
        current = check_rounding(current, name, exact)
    passes = [make_pass(name, {}) for name in (*EXACT, *ROUNDING)]
    whole = Pipeline(passes).run(program)
    assert whole.fingerprint() == current.fingerprint(), "split pipeline differs from the whole"
    return True
