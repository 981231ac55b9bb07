"""Signatures keep the nesting of a model's inputs and outputs, and refuse what does not fit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mopt.errors import ArtifactError, InputError
from mopt.frontend import capture
from mopt.program_signature import signature_of
from mopt.signature import Signature, TensorSpec, describe_tree


def _signature() -> Signature:
    return Signature(
        inputs=(
            TensorSpec("ids", "int64", ("batch", 4)),
            TensorSpec("mask", "float32", ("batch", "s2+1")),
        ),
        outputs=(TensorSpec("output_0", "float32", ("batch",)),),
        args=({"leaf": 0},),
        kwargs={"extra": {"dict": {"mask": {"leaf": 1}, "flag": {"value": True}}}},
        result={"dict": {"logits": {"leaf": 0}, "loss": {"value": None}}},
    )


def test_flatten_and_unflatten() -> None:
    signature = Signature.from_json(json.loads(json.dumps(_signature().as_json())))
    ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 7)
    flat = signature.flatten((ids,), {"extra": {"mask": mask, "flag": True}})
    assert flat[0] is ids and flat[1] is mask
    result = signature.unflatten([mask])
    assert result["logits"] is mask and result.logits is mask and result["loss"] is None


@pytest.mark.parametrize(
    ("args", "kwargs", "code", "says"),
    [
        ((), {}, "input-structure", "1 positional"),
        ((np.zeros((2, 5), np.int64),), None, "input-shape", "int64[batch, 4]"),
        ((np.zeros((2, 4), np.int32),), None, "input-shape", "found int32[2, 4]"),
        ((np.zeros((3, 4), np.int64),), None, "input-shape", "'mask'"),
        (([1, 2],), None, "input-type", "found list"),
    ],
)
def test_inputs_that_do_not_fit(args: Any, kwargs: Any, code: str, says: str) -> None:
    given_kwargs = {"extra": {"mask": torch.ones(2, 3), "flag": True}} if kwargs is None else kwargs
    with pytest.raises(InputError) as caught:
        _signature().flatten(args, given_kwargs)
    assert caught.value.code == code
    assert says in str(caught.value)


def test_a_constant_input_is_fixed() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="is fixed at True, found False"):
        _signature().flatten((ids,), {"extra": {"mask": torch.ones(2, 3), "flag": False}})


_trees = st.recursive(
    st.integers(0, 9).map(np.array) | st.sampled_from([None, True, 3, "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(_trees)
def test_any_nesting_comes_back(value: Any) -> None:
    leaves: list[Any] = []
    tree = describe_tree(value, leaves, lambda v: isinstance(v, np.ndarray))
    specs = tuple(TensorSpec(f"t{i}", "int64", ()) for i in range(len(leaves)))
    signature = Signature((), specs, (), {}, tree)
    again = Signature.from_json(json.loads(json.dumps(signature.as_json())))
    assert again.unflatten(leaves) == value


@pytest.mark.parametrize(
    "damage",
    [
        {"result": {"leaf": 1}},
        {"result": {"leaf": True}},
        {"result": {"tuple": 3}},
        {"result": {"exec": "x"}},
        {"result": {}},
        {"outputs": [{"name": "o", "dtype": "float32", "shape": [-1]}]},
        {"inputs": [{"name": 3, "dtype": "float32", "shape": []}]},
        {"kwargs": []},
        {"more": 1},
    ],
)
def test_malformed_signatures_are_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError) as caught:
        Signature.from_json({**_signature().as_json(), **damage})
    assert caught.value.code == "malformed-manifest"


def test_sizes_carry_the_users_names() -> None:
    """Nested inputs, keywords, and sizes computed from others; unnamed ones keep torch's names."""

    class Net(torch.nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], more: dict[str, Tensor]) -> Tensor:
            return torch.cat([pair[0] + pair[1], more["x"]], 1)

    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    x, y, z = torch.ones(3, 4, 2), torch.ones(4, 2), torch.ones(3, 5, 2)
    shapes = {"pair": ({0: batch, 1: time}, (time, None)), "more": {"x": {0: batch}}}
    found = signature_of(capture(Net(), {"pair": (x, y), "more": {"x": z}}, shapes))
    sizes = [spec.shape for spec in found.inputs]
    assert sizes == [("batch", "time", 2), ("time", 2), ("batch", 5, 2)]
    assert found.outputs[0].shape == ("batch", "time + 5", 2)
    auto = capture(torch.nn.Linear(2, 2), (y,), ({0: torch.export.Dim.DYNAMIC},))
    assert signature_of(auto).inputs[0].shape[0] not in (4, "DYNAMIC")
