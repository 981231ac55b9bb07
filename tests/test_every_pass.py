"""What holds for every pass, checked on the CASES its own test file lists.

A pass ``fold-constants`` of the family ``simplify`` is tested by
``tests/passes/simplify/test_fold_constants.py``; nothing is to be added here for a new one.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch

from mopt.pass_base import Numerics
from mopt.pipeline import rounding_bound
from mopt.registry import find_pass, list_passes
from tests.case import (
    Case,
    Outcome,
    assert_near,
    assert_same,
    grown_inputs,
    other_inputs,
    outputs,
)

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
OWN = {n: p for n, p in list_passes().items() if p.module.startswith("mopt.passes.")}


def _cases() -> dict[str, tuple[str, Case]]:
    found: dict[str, tuple[str, Case]] = {}
    for file in sorted(TESTS.glob("passes/*/test_*.py")):
        name = file.stem.removeprefix("test_").replace("_", "-")
        module = import_module(f"tests.passes.{file.parent.name}.{file.stem}")
        for case in getattr(module, "CASES", []):
            key = f"{name}/{case.name}"
            assert key not in found, f"{file.name} has two cases called {case.name!r}"
            found[key] = (name, case)
    return found


CASES = _cases()
every_case = pytest.mark.parametrize("key", sorted(CASES))


@cache
def outcome(key: str) -> Outcome:
    """Each case is captured and run once for all tests of this file."""
    return Outcome(*CASES[key])


@pytest.mark.parametrize("name", sorted(OWN))
def test_pass_has_cases_that_change_and_cases_that_do_not(name: str) -> None:
    claims = {case.changed for owner, case in CASES.values() if owner == name}
    folder = f"tests/passes/{OWN[name].family}"
    assert claims == {True, False}, f"{folder}/test_{name.replace('-', '_')}.py must have both"


def test_every_case_belongs_to_a_pass() -> None:
    assert {owner for owner, _ in CASES.values()} <= set(OWN)


@pytest.mark.parametrize("name", sorted(OWN))
def test_names_and_documentation(name: str) -> None:
    listing = OWN[name]
    words = name.split("-")
    assert listing.module.rpartition(".")[2] == "_".join(words)
    assert listing.class_name == "".join(word.capitalize() for word in words)
    assert listing.numerics == find_pass(name).numerics.value
    sections = [line for line in listing.doc.splitlines() if line.startswith("## ")]
    assert sections == ["## When to use", "## Accuracy", "## Limits", "## Example"]


@every_case
def test_claim(key: str) -> None:
    run = outcome(key)
    reasons = [f"{skip.site}: {skip.reason}" for skip in run.step.skipped]
    assert run.step.changed == run.case.changed, reasons
    if run.case.skipped:
        assert any(run.case.skipped in skip.reason for skip in run.step.skipped), reasons


@every_case
def test_golden_text(key: str, update_golden: bool) -> None:
    file = GOLDEN / f"{key}.txt"
    text = outcome(key).golden_text()
    if update_golden:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.is_file(), f"no {file.relative_to(TESTS)}: run pytest --update-golden, then read it"
    assert text == file.read_text(encoding="utf-8")


def test_no_golden_text_is_left_over() -> None:
    found = {str(p.relative_to(GOLDEN).with_suffix("")) for p in GOLDEN.rglob("*.txt")}
    assert found - set(CASES) == set()


@every_case
def test_numbers(key: str) -> None:
    run = outcome(key)
    inputs = [("example inputs", (run.original.args, run.original.kwargs))]
    grown = grown_inputs(run.original)
    if grown is not None:
        inputs.append(("a larger batch", grown))
    # A lossy bound holds for data like the calibration data, not for shuffled data.
    if run.one.numerics is not Numerics.LOSSY:
        inputs += [(f"inputs {seed}", other_inputs(run.original, seed)) for seed in (1, 2)]
    for what, (args, kwargs) in inputs:
        expected = outputs(run.original, args, kwargs)
        found = outputs(run.result, args, kwargs)
        if run.one.numerics is Numerics.EXACT or not run.step.changed:
            assert_same(expected, found, what)
            continue
        tolerance = run.case.tolerance
        if tolerance is None:
            assert run.one.numerics is Numerics.ROUNDING, f"{key}: state a tolerance"
            tolerance = rounding_bound(run.one, run.original)
        assert_near(expected, found, tolerance=tolerance, what=what)


@every_case
def test_original_is_untouched(key: str) -> None:
    run = outcome(key)
    assert run.result is not run.original
    assert run.before.differences(run.original) == []


@every_case
def test_same_seed_gives_the_same_program(key: str) -> None:
    run = outcome(key)
    torch.manual_seed(1234)  # the global generator must not matter
    assert run.run_on(run.original).fingerprint() == run.result.fingerprint()


@every_case
def test_exact_pass_changes_nothing_the_second_time(key: str) -> None:
    run = outcome(key)
    if run.one.numerics is Numerics.EXACT:
        assert not run.run_on(run.result).steps[-1].changed


@every_case
def test_result_can_be_exported_again(key: str) -> None:
    run = outcome(key)
    for part in run.result.parts().values():
        again = torch.export.export(
            part.graph_module, part.args, part.kwargs or None, dynamic_shapes=part.dynamic_shapes
        ).module(check_guards=False)
        args, kwargs = grown_inputs(part) or (part.args, part.kwargs)
        expected = outputs(part, args, kwargs)
        assert_same(expected, outputs(again, args, kwargs), "the program exported again")
