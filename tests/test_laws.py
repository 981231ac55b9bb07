"""Laws over generated programs, and proof that they find what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from mopt.effects import is_pure, returned_nodes, written_nodes
from mopt.errors import PassError
from mopt.passes.simplify import (
    _identities,
    fold_constants,
    fold_norm_affine,
    fold_scale,
    merge_duplicates,
)
from mopt.passes.simplify._affine_layers import AffineLayer, NewWeights
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.recipe import Recipe
from mopt.registry import list_passes, make_pass
from tests import strategies
from tests.case import Sample
from tests.laws import EXACT, ROUNDING, check_all, check_exact, check_rounding, reference
from tests.strategies import samples

aten = torch.ops.aten


def test_laws_hold_for_generated_programs() -> None:
    """For many more programs: python -m tests.fuzz --minutes 10."""
    counts: Counter[str] = Counter()

    @settings(max_examples=25)
    @given(samples(max_steps=8))
    def check(sample: Sample) -> None:
        counts["used" if check_all(sample) else "discarded"] += 1

    check()
    assert counts["discarded"] <= 0.05 * counts.total(), "the generator gives useless programs"


# ---- metamorphic: what was put in comes out again


def _insertions() -> dict[str, Callable[[Program, fx.Node], fx.Node]]:
    """Ways to put a no-op behind a node, which must have a floating-point value."""

    def call(program: Program, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        with program.graph.inserting_after(node):
            new = program.graph.call_function(target, (node, *args))
        return new

    return {
        "alias": lambda p, n: call(p, n, aten.alias.default),
        "clone": lambda p, n: call(p, n, aten.clone.default),
        "times one": lambda p, n: call(p, n, aten.mul.Tensor, 1),
        "minus zero": lambda p, n: call(p, n, aten.sub.Tensor, 0.0),
        "dropout": lambda p, n: call(p, n, aten.dropout.default, 0.5, False),
        "transposes": lambda p, n: call(
            p, call(p, n, aten.transpose.int, 0, -1), aten.transpose.int, -1, 0
        ),
        "casts": lambda p, n: call(
            p, call(p, n, aten.to.dtype, torch.float64), aten.to.dtype, torch.float32
        ),
    }


@settings(max_examples=10)
@given(samples(max_steps=5), st.data())
def test_inserted_no_ops_are_removed_again(sample: Sample, data: st.DataObject) -> None:
    program = sample.capture()
    clean = Pipeline([make_pass("remove-no-ops", {})]).run(program)
    kept = written_nodes(clean) | returned_nodes(clean)  # copies protect these
    places = [
        node
        for node in clean.nodes
        if node not in kept
        if is_pure(node) and _is_inner(node) and node.meta["val"].dtype == torch.float32
        if node.meta["val"].is_contiguous()  # a clone of others has another layout
    ]
    if not places:
        return
    dirty = clean.copy()
    nodes = {node.name: node for node in dirty.nodes}
    for place in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=4)):
        insert = data.draw(st.sampled_from(list(_insertions().values())))
        node = nodes[place.name]
        users = list(node.users)
        new = insert(dirty, node)
        for user in users:
            user.replace_input_with(node, new)
    dirty.refresh()
    again = Pipeline([make_pass("remove-no-ops", {})]).run(dirty)
    assert again.text() == clean.text()


def _is_inner(node: fx.Node) -> bool:
    """A tensor that is no output and that no call writes to."""
    return isinstance(node.meta.get("val"), Tensor) and not any(
        user.op == "output" or not is_pure(user) for user in node.users
    )


@settings(max_examples=10)
@given(samples(max_steps=5), st.data())
def test_inserted_duplicates_are_merged_again(sample: Sample, data: st.DataObject) -> None:
    once = Pipeline([make_pass("merge-duplicates", {})])
    clean = once.run(sample.capture())
    written = written_nodes(clean)
    places = [
        node
        for node in clean.nodes
        if is_pure(node) and _is_inner(node) and node.users
        if not written.intersection([node, *node.all_input_nodes])
    ]
    if not places:
        return
    dirty = clean.copy()
    nodes = {node.name: node for node in dirty.nodes}
    for place in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=4)):
        node = nodes[place.name]
        if not node.users:  # the copies have them all
            continue
        user = data.draw(st.sampled_from(sorted(node.users, key=lambda n: n.name)))
        with dirty.graph.inserting_after(node):
            twin = dirty.graph.node_copy(node)
        user.replace_input_with(node, twin)
    dirty.refresh()
    assert once.run(dirty).text() == clean.text()


# ---- recipes


def _option_values(name: str, value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 1 << 40)
    return st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)


@st.composite
def recipes(draw: Callable[[Any], Any]) -> Recipe:
    """A random order of the simplify passes with random options, as TOML would hold it."""
    name = draw(st.text('abc-"\\é ', max_size=8))
    lines = [f"name = {_quoted(name)}"]
    for name in draw(st.lists(st.sampled_from((*EXACT, *ROUNDING)), max_size=6)):
        lines += ["[[pass]]", f'name = "{name}"']
        for key, value in make_pass(name, {}).options().items():
            if draw(st.booleans()):
                new = draw(_option_values(key, value))
                lines.append(
                    f"{key} = {str(new).lower() if isinstance(new, int) else _quoted(new)}"
                )
    return Recipe.from_toml("\n".join(lines))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@settings(max_examples=50)
@given(recipes(), st.booleans())
def test_recipes_come_back_from_their_own_text(recipe: Recipe, full: bool) -> None:
    again = Recipe.from_toml(recipe.to_toml(full=full))
    assert again.name == recipe.name
    assert again.passes() == recipe.passes()
    assert again.to_toml(full=True) == recipe.to_toml(full=True)


def test_every_pass_can_be_made_from_its_own_options() -> None:
    for name in list_passes():
        one = make_pass(name, {})
        given_options = {key: value for key, value in one.options().items() if value is not None}
        assert make_pass(name, given_options) == one


# ---- planted defects: the laws must find each of them


def _no_bias(self: AffineLayer, scale: Tensor, shift: Tensor) -> NewWeights:
    """Forgets that a batch norm shifts."""
    new = _TRUE_OUTPUT(self, scale, shift)
    return NewWeights(new.weight, None if self.bias is None else self.bias.double())


def _unscaled_bias(self: AffineLayer, scale: Tensor, shift: Tensor) -> NewWeights:
    """Scales the weight, but not the old bias."""
    new = _TRUE_OUTPUT(self, scale, shift)
    return NewWeights(new.weight, None if new.bias is None else self._bias_or_zeros() + shift)


def _wrong_axis(self: AffineLayer, scale: Tensor, shift: Tensor) -> NewWeights:
    """Scales input channels instead of output channels where both are as many."""
    new = _TRUE_OUTPUT(self, scale, shift)
    square = self.weight.shape[0] == self.weight.shape[1] and scale.numel() > 1
    weight = self.weight.double()
    factors = scale.reshape(1, -1, *[1] * (weight.dim() - 2))
    return NewWeights(weight * factors, new.bias) if square else new


_TRUE_OUTPUT = AffineLayer.fold_into_output


def _same_sizes(left: fx.Node, right: fx.Node) -> bool:
    """Forgets strides and dtypes: a square transpose looks like nothing."""
    a, b = left.meta.get("val"), right.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.numel() == b.numel()


def _crosses_all(node: fx.Node, source: fx.Node, *rest: Any) -> bool:
    """Takes every operator for one that moves elements only."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)


def _only_nodes(value: Any) -> Any:
    """Forgets arguments that are not nodes: x[0] equals x[1]."""
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return tuple(found)


def _always_neutral(program: Program, argument: Any, value: int) -> bool:
    """Takes 0.5 for 1."""
    return argument in (value, 0.5) if isinstance(argument, int | float) else False


# Each defect: the pass that has it, what it replaces, and what a program must begin with to show
# it: chance alone would find some of them only now and then.
PLANTED: dict[str, tuple[str, Any, str, Any, Any]] = {
    "missing bias": (
        "fold-batch-norm",
        AffineLayer,
        "fold_into_output",
        _no_bias,
        strategies.conv_bn_relu,
    ),
    "unscaled bias": (
        "fold-batch-norm",
        AffineLayer,
        "fold_into_output",
        _unscaled_bias,
        strategies.conv_bn_relu,
    ),
    "wrong axis": (
        "fold-batch-norm",
        AffineLayer,
        "fold_into_output",
        _wrong_axis,
        strategies.conv_bn_relu,
    ),
    "padding ignored": (
        "fold-scale",
        AffineLayer,
        "pads_with_zeros",
        property(lambda self: False),
        strategies.shifted_image,
    ),
    "readers ignored": (
        "fold-norm-affine",
        fold_norm_affine,
        "keeps_last_axis",
        _crosses_all,
        strategies.normed_linears,
    ),
    "anything crosses": (
        "fold-scale",
        fold_scale,
        "_crosses",
        _crosses_all,
        strategies.scaled_activation,
    ),
    "shape ignored": ("remove-no-ops", _identities, "same_layout", _same_sizes, strategies.view),
    "wrong constant": (
        "remove-no-ops",
        _identities,
        "_filled_with",
        _always_neutral,
        strategies.scalar,
    ),
    "writes ignored": (
        "merge-duplicates",
        merge_duplicates,
        "written_nodes",
        lambda program: set(),
        strategies.in_place,
    ),
    "arguments ignored": (
        "merge-duplicates",
        merge_duplicates,
        "_freeze",
        _only_nodes,
        strategies.duplicate,
    ),
    "writes ignored, too": (
        "fold-constants",
        fold_constants,
        "written_nodes",
        lambda program: set(),
        strategies.filled_in,
    ),
}


@pytest.mark.parametrize("defect", sorted(PLANTED))
def test_a_planted_defect_is_found(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, owner, attribute, wrong, motif = PLANTED[defect]
    monkeypatch.setattr(owner, attribute, wrong)

    @settings(max_examples=200, phases=[Phase.generate], database=None)
    @given(samples(max_steps=3, motif=motif))
    def check(sample: Sample) -> None:
        exact = reference(sample)
        if exact is None:
            return
        if name in EXACT:
            check_exact(sample.capture(), name)
        else:
            check_rounding(sample.capture(), name, exact)

    with pytest.raises((AssertionError, PassError)):
        check()
